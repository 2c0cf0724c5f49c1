"""One layer of one sequence under a decode method: resident, searched and new keys, merged."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gpu_worker.attention import Partial, causal_attention, merge
from library.decode.base import DecodeMethod, LayerContext, Search
from library.decode.gathered import attend_rows
from longreach.types import WorkFigures


@dataclass(frozen=True, slots=True)
class Attended:
    """output [q_heads, T, value_dim], lse [q_heads, T], and the work it took.

    The figures count every position before the call as in scope, resident ones included, so that
    methods with and without a resident set compare; the tokens being fed are not counted.
    """

    partial: Partial
    work: WorkFigures


class LayerDecoder:
    """Attends a context and what was fed after it, as one method chooses."""

    def __init__(self, method: DecodeMethod, context: LayerContext) -> None:
        self.method = method
        self.context = context
        self._search: Search | None = None
        self._prepared = False

    @property
    def kind(self) -> str:
        """Index kind that answers; "" before the first call and for methods without one."""
        return self._search.kind if self._search is not None else ""

    def attend(
        self, queries: torch.Tensor, tail_keys: torch.Tensor, tail_values: torch.Tensor
    ) -> Attended:
        """Attention of the newest T tokens' queries [q_heads, T, d].

        tail_keys [kv_heads, t, d] and tail_values hold every position after the context, the T new
        ones last; those are attended causally, whatever the method.
        """
        context, tokens = self.context.tokens, queries.shape[1]
        seen = context + tail_keys.shape[1] - tokens
        resident = self.method.resident(context, seen)
        part = self._new_and_tail(queries, tail_keys, tail_values, resident, seen)
        held = self._in_context(resident)
        if held is not None:
            part = merge(part, attend_rows(queries, *held, self.context.call))
        work = self._resident_work(sum(len(range(seen)[each]) for each in resident), seen, tokens)
        scope = self.method.scope(context, seen)
        search = self._ready() if len(scope) else None
        if search is not None:
            found = search.attend(queries, scope)
            part, work = merge(part, found.partial), work + found.work
        return Attended(part, work)

    def held(self, seen: int) -> int:
        """(KV head, position) pairs to keep on the device when `seen` positions have been fed."""
        resident = self.method.resident(self.context.tokens, seen)
        positions = sum(len(range(seen)[each]) for each in resident)
        searched = self._search.held if self._search is not None else 0
        return self.context.geometry.kv_heads * positions + searched

    def _ready(self) -> Search | None:
        if not self._prepared:
            self._search = self.method.prepare(self.context)
            self._prepared = True
        return self._search

    def _new_and_tail(
        self,
        queries: torch.Tensor,
        tail_keys: torch.Tensor,
        tail_values: torch.Tensor,
        resident: list[slice],
        seen: int,
    ) -> Partial:
        """Attention over the resident part of the tail, and causally over the new tokens."""
        context, call = self.context.tokens, self.context.call
        before = [_shifted(each, context, seen) for each in resident]
        before.append(slice(seen - context, None))
        keys = _joined(tail_keys, before)
        values = _joined(tail_values, before)
        start = keys.shape[1] - queries.shape[1]
        return causal_attention(queries, keys, values, start, call.scale, call.softcap)

    def _in_context(self, resident: list[slice]) -> tuple[torch.Tensor, torch.Tensor] | None:
        context = self.context
        pieces = [slice(p.start, min(p.stop, context.tokens), p.step) for p in resident]
        keys = _joined(context.keys, pieces)
        return (keys, _joined(context.values, pieces)) if keys.shape[1] else None

    def _resident_work(self, positions: int, seen: int, rows: int) -> WorkFigures:
        heads, row_bytes = self.context.geometry.kv_heads * rows, self.context.row_bytes
        work = WorkFigures(
            keys_in_scope=heads * seen,
            bytes_in_scope=heads * seen * row_bytes,
            keys_covered=heads * seen,
        )
        held = heads * positions
        return replace(work, keys_scanned=held, keys_attended=held, bytes_read=held * row_bytes)


def _shifted(positions: slice, context: int, seen: int) -> slice:
    """The part of a slice of positions that lies in [context, seen), counted from the context."""
    step = positions.step or 1
    start = positions.start
    if start < context:
        start += -(-(context - start) // step) * step
    return slice(start - context, max(start, min(positions.stop, seen)) - context, step)


def _joined(rows: torch.Tensor, pieces: list[slice]) -> torch.Tensor:
    """The pieces of rows [heads, n, d] behind each other; a view where one piece is enough."""
    found = [piece for piece in (rows[:, each] for each in pieces) if piece.shape[1]]
    if not found:
        return rows[:, :0]
    return found[0] if len(found) == 1 else torch.cat(found, 1)
