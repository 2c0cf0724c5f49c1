"""What a decode method is: which earlier keys a new token attends.

A method divides the positions before a token in two. The **resident** ones are named by position
alone and always attended; of the **scope**, a search prepared once per layer and context attends
some. Attention over both, and over the new tokens themselves, merges exactly by log-sum-exp
(gpu_worker.attention), so that with everything resident, or a search that attends its whole scope,
the result is full attention.

A new method is one file: a frozen dataclass registered in `DECODE_METHODS` whose fields are its
parameters. The shared tests then run it.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from gpu_worker.attention import LayerCall, Partial
from longreach.errors import InvalidRequest
from longreach.registry import Registry
from longreach.types import IntArray, LayerGeometry, Span, StorageArray, WorkFigures

OBSERVED_QUERIES = 128
"""Last queries of a prompt that are kept for methods that choose by them."""


@dataclass(frozen=True, slots=True)
class QueryRecord:
    """What is kept of a prompt's queries at one layer; all after rope.

    last [q_heads, w, d]: of its last w <= OBSERVED_QUERIES tokens. positions [s] and sampled
    [q_heads, s, d] (host, storage dtype): what attention-aware indexes are trained on. mean
    [kv_heads, n, d], kept where a method `needs_every_query`: of every position, the mean over the
    query heads that share a KV head.
    """

    last: torch.Tensor
    positions: IntArray
    sampled: StorageArray
    mean: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerContext:
    """Keys and values of a context at one layer, and what is known of its queries.

    keys [kv_heads, n, head_dim], values [kv_heads, n, value_dim]: contiguous, never written again.
    after [kv_heads, m, head_dim]: keys of prompt tokens behind the context (a question that was fed
    to a stored context); `queries.last` are then the last ones of the whole prompt.
    """

    geometry: LayerGeometry
    keys: torch.Tensor
    values: torch.Tensor
    queries: QueryRecord
    call: LayerCall
    after: torch.Tensor
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> int:
        """Positions of the context."""
        return int(self.keys.shape[1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one key and one value row of one head."""
        elements = int(self.keys.shape[2] + self.values.shape[2])
        return elements * int(self.keys.element_size())

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once per context: methods that share an index build one."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def asked(self, after: torch.Tensor, last_queries: torch.Tensor) -> LayerContext:
        """The same context behind which a question was fed; what was made of it is shared."""
        last = torch.cat([self.queries.last, last_queries], 1)[:, -OBSERVED_QUERIES:]
        queries = dataclasses.replace(self.queries, last=last)
        return dataclasses.replace(self, queries=queries, after=after)


@dataclass(frozen=True, slots=True)
class Found:
    """Partial attention over a scope, output [q_heads, T, value_dim] and lse [q_heads, T].

    `work` counts what was scanned, scored by a code, attended and read; the caller knows the scope.
    """

    partial: Partial
    work: WorkFigures


class Search(ABC):
    """A method made ready for one layer of one context."""

    kind: str = ""
    """Index kind that answers, of searches that have one."""
    held: int = 0
    """(KV head, position) pairs that the search keeps on the device."""

    @abstractmethod
    def attend(self, queries: torch.Tensor, scope: Span) -> Found:
        """Attention of queries [q_heads, T, d] over chosen keys at positions in `scope`.

        The scope lies in the context and is not empty.
        """


class DecodeMethod(ABC):
    """Which keys are attended. Implementations are frozen dataclasses of their parameters."""

    name: ClassVar[str] = ""
    """Registered name."""
    observes: ClassVar[bool] = False
    """Whether it chooses once, by the prompt's last queries: chosen anew when the prompt grows."""
    needs_every_query: ClassVar[bool] = False
    """Whether `QueryRecord.mean` has to be kept."""

    @abstractmethod
    def resident(self, context: int, seen: int) -> list[slice]:
        """Positions below `seen` that are always attended: ascending, disjoint slices.

        `context` positions are stored; those from there on were fed later.
        """

    def scope(self, context: int, seen: int) -> Span:
        """Positions of the context that are searched; disjoint from the resident ones."""
        return Span(0, 0)

    def prepare(self, layer: LayerContext) -> Search | None:
        """Makes the method ready for a layer; None for methods that search nothing."""
        return None

    def __str__(self) -> str:
        """Name and every parameter, as `parse_decode` reads it."""
        values = ",".join(f"{key}={value}" for key, value in self.parameters().items())
        return f"{self.name}:{values}" if values else self.name

    def parameters(self) -> dict[str, int | float | bool | str]:
        """Parameters by name, in the order of their definition."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {each.name: getattr(self, each.name) for each in fields}


DECODE_METHODS: Registry[type[DecodeMethod]] = Registry("decode method")
"""Every decode method by name. Index kinds of the retrieval nodes are names too: see `spec`."""


def at_least(lowest: int, **parameters: int) -> None:
    """Raises InvalidRequest for a parameter below `lowest`."""
    for name, value in parameters.items():
        if value < lowest:
            raise InvalidRequest(f"{name} is {value}; it must be at least {lowest}")


def sink_and_window(sink: int, window: int, context: int, seen: int) -> list[slice]:
    """The first `sink` and the last `window` positions below `seen`, and all after the context."""
    first = min(sink, seen)
    start = min(max(first, seen - window), max(first, context))
    return [slice(0, first), slice(start, seen)]


def between(resident: list[slice], context: int) -> Span:
    """What lies in the context between the two slices of `sink_and_window`."""
    return Span(resident[0].stop, max(resident[0].stop, min(resident[1].start, context)))
