"""What `longreach eval` asks where no flag says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from coordinator.config import CoordinatorConfig
from gpu_worker.config import WorkerConfig

QUICK_LIMIT_S = 240.0
"""After this, --quick asks nothing more; with start and report it ends within five minutes."""


DEFAULT_JOBS = 4
"""Processes that answer side by side, where there are as many CPUs: each holds the model and a
context."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Values of --tasks, --lengths (tokens), --methods and --n.

    limits: how far up the lengths some tasks and methods go (runner.Plan).
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    methods: tuple[str, ...]
    n: int
    limits: Mapping[str, int] = field(default_factory=dict)


def _default(config: type, name: str) -> str:
    (value,) = [each.default for each in fields(config) if each.name == name]
    return str(value)


BUDGET = _default(CoordinatorConfig, "default_budget")
PREFILL = _default(WorkerConfig, "prefill_pattern")
DEFAULT_METHOD = f"local/auto:{BUDGET}" + ("" if PREFILL == "dense" else f"@{PREFILL}")
"""What a cluster does for a request that says nothing, in this process."""

_INDEXES = (
    "local/flat:top_k=100",  # exact nearest neighbours
    "local/roargraph:top_k=100",  # RetrievalAttention
    "local/ivf:top_k=100",
    "local/hnsw:top_k=100",
)
_BUDGETS = (
    "local/auto:top_k=20",
    "local/auto:top_k=400",
    "local/auto:top_k=100+tail",
    "local/auto:mass=0.95[64,1024]+tail",
    "local/auto:beta=8",
)
_PUBLISHED = (
    # Sink and window as ours, or about 2048 keys: several times what our default attends.
    "local/streaming_llm:sink=128,window=512",
    "local/dilated:sink=128,window=2048,interval=1",
    "local/strided",
    "local/static_top_k:top_k=1000",
    "local/snapkv:capacity=2048",
    "local/quest:budget=2048",
    "local/infllm:window=512,blocks=16",
)
_PREFILLS_BESIDE = tuple(
    f"local/full@{pattern}"
    for pattern in (
        *("a_shape", "dilated", "strided", "top_k"),
        *("vertical_slash", "block_sparse", "minference"),
    )
)
# Builds or selections that take minutes for a context of 128K.
_SLOW = (
    "local/ivf:top_k=100",
    "local/hnsw:top_k=100",
    "local/dilated:sink=128,window=2048,interval=1",
    "local/strided",
    "local/infllm:window=512,blocks=16",
)

DEFAULT = Selection(
    tasks=("mixed", "needle", "diffuse"),
    lengths=(4096, 8192, 16_384, 32_768, 65_536, 131_072),
    methods=tuple(
        dict.fromkeys(
            (
                *("full", DEFAULT_METHOD, f"local/auto:{BUDGET}", f"local/auto:{BUDGET}@adaptive"),
                *_INDEXES,
                *_BUDGETS,
                *_PUBLISHED,
                *_PREFILLS_BESIDE,
                "local/full@adaptive",
            )
        )
    ),
    n=2,
    limits={
        "needle": 16_384,  # a prefill for each depth
        **dict.fromkeys((*_BUDGETS, *_SLOW), 65_536),
        **dict.fromkeys(_PREFILLS_BESIDE, 16_384),
    },
)
QUICK = Selection(
    tasks=("mixed", "diffuse"),
    lengths=(16_384,),
    methods=(
        *("full", DEFAULT_METHOD, "local/streaming_llm:sink=128,window=512"),
        f"cluster:{BUDGET}",
    ),
    n=1,
)
