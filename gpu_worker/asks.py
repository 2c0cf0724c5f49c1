"""What is asked of nodes in one layer: pieces of sessions' rows, and messages that carry them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpu_worker.methods.base import HeadPart, Retrieved, SessionQueries
from gpu_worker.node_health import NodeHealth
from gpu_worker.routes import Piece, Route
from longreach.errors import (
    ConnectionLost,
    CoverageTooLow,
    Internal,
    LongreachError,
    StaleEpoch,
)
from longreach.types import AttendResult, AttendRows, Span, StorageArray, WorkFigures


@dataclass(slots=True)
class NodeSession:
    """A session's route and the handles its nodes gave; `lost` nodes miss some of its tail."""

    route: Route
    handles: dict[str, int]
    lost: set[str] = field(default_factory=set)

    def holders(self, piece: Piece) -> list[str]:
        """Nodes that can answer for a piece, preferred one first."""
        return [n for n in piece.node_ids if n in self.handles and n not in self.lost]

    def can_lose(self, node_id: str) -> bool:
        """Whether others hold all that a node holds of the session."""
        return all(
            any(other != node_id for other in self.holders(piece))
            for pieces in self.route.pieces
            for piece in pieces
            if node_id in piece.node_ids
        )


@dataclass(slots=True)
class Ask:
    """One piece of one session's rows: queries [rows, q_heads, head_dim] of the piece's heads."""

    number: int
    session: NodeSession
    asked: SessionQueries
    piece: Piece
    scope: Span
    q_head_start: int
    queries: StorageArray
    tried: set[str] = field(default_factory=set)
    repeated: bool = False
    under_way: int = 0
    hedged: int = 0
    answer: AttendResult | None = None
    error: LongreachError | None = None

    @property
    def rows(self) -> tuple[int, int]:
        """Rows and query heads asked."""
        return self.queries.shape[0], self.queries.shape[1]

    def untried(self) -> list[str]:
        """Nodes that could still be asked."""
        return [n for n in self.session.holders(self.piece) if n not in self.tried]

    def may_go_on(self) -> bool:
        """Whether to ask again: another node or, once, the same ones over new connections."""
        if self.answer is not None or self.under_way or isinstance(self.error, StaleEpoch):
            return False
        lost_connection = isinstance(self.error, ConnectionLost)
        if not self.untried() and lost_connection and not self.repeated:
            self.repeated = True
            self.tried.clear()
        return bool(self.untried())

    def for_node(self, node_id: str) -> AttendRows:
        """The rows as that node knows the session."""
        return AttendRows(
            handle=self.session.handles[node_id],
            kv_head_start=self.piece.kv_head_start,
            kv_head_stop=self.piece.kv_head_stop,
            scope=self.scope,
            budget=self.asked.budget,
            queries=self.queries,
        )

    def take(self, node_id: str, result: AttendResult | LongreachError) -> None:
        """Keeps a node's result; an answer over fewer keys than asked counts as none."""
        if self.answer is not None:
            return
        if isinstance(result, LongreachError):
            self.error = result
            if result.reason == "UNKNOWN_HANDLE":  # Its process is another one by now.
                self.session.lost.add(node_id)
        elif result.work.keys_covered < result.work.keys_in_scope:
            self.error = CoverageTooLow(
                f"node {node_id!r} holds {result.work.coverage:.1%} of {self.scope} of shard "
                f"{self.piece.shard_id!r}"
            )
        else:
            self.answer, self.error = result, None

    def report(self, into: Retrieved, row_bytes: int) -> None:
        """Adds this piece to its session's answer."""
        into.hedged_requests += self.hedged
        if self.answer is not None:
            into.parts.append(HeadPart(self.q_head_start, self.answer.partial))
            into.work = into.work + self.answer.work
            into.index_kinds.add(self.answer.index_kind)
            return
        heads = self.piece.kv_head_stop - self.piece.kv_head_start
        missing = self.rows[0] * heads * len(self.scope)
        into.work = into.work + WorkFigures(
            keys_in_scope=missing, bytes_in_scope=missing * row_bytes
        )
        into.error = self.error


@dataclass(eq=False, slots=True)
class Message:
    """A request on its way to one node. `late` while it is out though it should have come;
    `left` when its asks were answered by another node meanwhile."""

    node_id: str
    address: str
    health: NodeHealth
    asks: list[Ask] = field(default_factory=list)
    size: int = 0
    sent_at: float = 0.0
    late_at: float = math.inf
    late: bool = False
    left: bool = False
    reply: asyncio.Future[Any] | None = None

    @property
    def done(self) -> bool:
        """Whether there is nothing left to wait for."""
        return self.reply is None or self.reply.done()


def check_values(
    results: Sequence[AttendResult | LongreachError], value_dim: int, node_id: str
) -> None:
    """Raises Internal for partial attention that no honest node computes: it must never be merged.

    An lse is a number or, where no key was seen, -inf.
    """
    for result in results:
        if isinstance(result, LongreachError):
            continue
        output, lse = result.partial.output, result.partial.lse
        if (
            output.shape[-1] != value_dim
            or not np.isfinite(output).all()
            or not (lse < np.inf).all()
        ):
            raise Internal(
                f"node {node_id!r} returned outputs {output.shape} of values of {value_dim} with "
                f"{int((~np.isfinite(output)).sum())} that are no numbers; its answer is not used"
            )
