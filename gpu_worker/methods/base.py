"""What a retriever is: it finds and attends the offloaded keys of one layer.

`send` starts the work for every session of a step, `Ticket.collect` waits for it; what the device
does between the two is hidden behind it. The fan-out to retrieval nodes and the in-process one have
this one interface, so that the same tests run over both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from longreach.errors import LongreachError
from longreach.types import Budget, PartialAttention, Span, StorageArray, WorkFigures
from longreach.wire import NodeTiming


@dataclass(frozen=True, slots=True)
class SessionQueries:
    """Queries [rows, q_heads, head_dim] of one session; all of them may attend `scope`."""

    session_id: str
    queries: StorageArray
    scope: Span
    budget: Budget


@dataclass(frozen=True, slots=True)
class HeadPart:
    """Partial attention of query heads from `q_head_start` on: output [rows, heads, value_dim]."""

    q_head_start: int
    partial: PartialAttention


@dataclass(slots=True)
class Retrieved:
    """Answer to SessionQueries: parts over disjoint keys, not merged.

    `work.keys_covered` is below `work.keys_in_scope` where shards did not answer; `error` then says
    which and why. `hedged_requests` went to a second node because the first was late.
    """

    parts: list[HeadPart] = field(default_factory=list)
    work: WorkFigures = field(default_factory=WorkFigures)
    index_kinds: set[str] = field(default_factory=set)
    error: LongreachError | None = None
    hedged_requests: int = 0


@dataclass(frozen=True, slots=True)
class Collected:
    """Answers in the order of the queries; `slowest` are the times of the slowest node."""

    answers: list[Retrieved]
    slowest: NodeTiming = field(default_factory=NodeTiming)


class Ticket(Protocol):
    """Work under way for one layer."""

    def collect(self) -> Collected:
        """Waits for every answer. Failures are told per session, never raised."""


class Retriever(Protocol):
    """Attends offloaded keys."""

    def send(
        self,
        layer: int,
        queries: Sequence[SessionQueries],
        scale: float,
        softcap: float,
        deadline: float,
        traceparent: str = "",
    ) -> Ticket:
        """Starts the work; `deadline` is on the clock of time.monotonic. Scopes are not empty.
        `traceparent` is that of the span it belongs to, where the step is traced."""
