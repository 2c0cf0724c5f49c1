"""How to generate: the keyword arguments of `generate` and `stream`, once for both clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from longreach.sdk.models import Context
from longreach.types import Budget


class GenerateKeywords(TypedDict, total=False):
    """The fields of GenerateOptions as keyword arguments, for type checkers and editors."""

    context: Context | str | None
    model: str
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: str | Sequence[str]
    ignore_eos: bool
    budget: Budget | str | None
    min_coverage: float
    logprobs: int
    request_id: str


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """How to generate.

    context: what the prompt continues, or its id; None for no context. model: needed when the
    cluster serves several. max_tokens: 0 for the server's default. temperature: 0 is greedy.
    top_p, top_k: 0 is off. seed: equal seeds draw equal tokens. stop: texts that end the
    generation and are not part of it. ignore_eos: go on past the model's end of sequence. budget:
    how many keys decode may use ("top_k=100", "mass=0.98", "beta=8", "exact"); None for the
    server's default. min_coverage: lowest share of the context that must answer; 0 means 1.
    logprobs: how many of the likeliest tokens come with each token. request_id: made up if empty.
    """

    context: Context | str | None = None
    model: str = ""
    max_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    seed: int = 0
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    budget: Budget | str | None = None
    min_coverage: float = 0.0
    logprobs: int = 0
    request_id: str = ""
