"""What a method is in a comparison, by its name; targets and the page of results go by it."""

from __future__ import annotations

import re
from enum import Enum

from evaluation.defaults import BUDGET, DEFAULT_METHOD


class Role(Enum):
    """FULL: the yardstick. DEFAULT: what longreach does unless told otherwise. SEARCHES: finds keys
    for every query by an index or a prefill of ours. DROPS_KEYS: decides which keys stay before the
    question is known. BASELINE: any other published method."""

    FULL = "full attention"
    DEFAULT = "longreach's default"
    SEARCHES = "longreach, another index, budget or prefill"
    DROPS_KEYS = "drops keys before the question"
    BASELINE = "published method"


_ROLES = (
    (r"full", Role.FULL),
    (f"{re.escape(DEFAULT_METHOD)}|cluster:{re.escape(BUDGET)}", Role.DEFAULT),
    (r"local/.*\bprompt=whole\b.*", Role.BASELINE),
    (r"local/(streaming_llm|static_top_k|snapkv|dilated|strided)\b.*", Role.DROPS_KEYS),
    (r"local/(quest|infllm)\b.*", Role.BASELINE),
    (r"(local|cluster)/(ivf|hnsw)\b.*", Role.BASELINE),
    (r"local/.*@(?!adaptive|dense)\w+.*", Role.BASELINE),
)


def role_of(method: str) -> Role:
    """The role of a method as `--methods` names it."""
    for pattern, role in _ROLES:
        if re.fullmatch(pattern, method):
            return role
    return Role.SEARCHES
