"""Base of the kinds that the native module answers: every row of a batch in one call."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from itertools import repeat

from longreach.types import PartialAttention, WorkFigures
from retrieval_node import kernel
from retrieval_node.index.base import Index, IndexAnswer, IndexRows, LayerKv
from retrieval_node.index.kernel_rows import (
    RowCosts,
    check_floor,
    every_position,
    explain_refusal,
    index_answer,
    kernel_entry,
    kernel_rows,
    local_bounds,
    local_scope,
    positions_of,
)


class KernelIndex(Index):
    """One kernel call for the rows with a budget, one for those with an exact one.

    `summary_bytes` is what a value summary of the tail estimate reads, 0 if the kind has none.
    """

    def __init__(self, kv: LayerKv, summary_bytes: int = 0) -> None:
        self._kv = kv
        self._costs = RowCosts.of(kv, summary_bytes)

    @abstractmethod
    def attend_entries(
        self, entries: list[kernel.Entry], scale: float, softcap: float, want_selected: bool
    ) -> kernel.Results:
        """The kernel call; ValueError when rows do not fit the keys or hold NaN or infinity."""

    def attend(
        self,
        batch: Sequence[IndexRows],
        scale: float,
        softcap: float = 0.0,
        *,
        want_selected: bool = False,
    ) -> list[IndexAnswer]:
        """See Index.attend."""
        for rows in batch:
            if rows.budget.exact:
                return self._mixed(batch, scale, softcap, want_selected)
        return self._budgeted(batch, scale, softcap, want_selected)

    def _budgeted(
        self, batch: Sequence[IndexRows], scale: float, softcap: float, want_selected: bool
    ) -> list[IndexAnswer]:
        kv, costs = self._kv, self._costs
        entries = list(map(kernel_entry, batch, repeat(kv)))
        try:
            figures, selected = self.attend_entries(entries, scale, softcap, want_selected)
        except ValueError:
            explain_refusal(batch, kv)
            raise
        answers = list(map(index_answer, entries, figures, repeat(costs)))
        if want_selected:
            return [
                answer._replace(selected=positions_of(lists, answer.partial.lse.shape, kv.start))
                for answer, lists in zip(answers, selected, strict=True)
            ]
        return answers

    def _mixed(
        self, batch: Sequence[IndexRows], scale: float, softcap: float, want_selected: bool
    ) -> list[IndexAnswer]:
        """Some or all budgets are exact; answers come in the batch's order."""
        exact = [rows for rows in batch if rows.budget.exact]
        others = [rows for rows in batch if not rows.budget.exact]
        [whole] = attend_whole([(self._kv, exact)], scale, softcap, want_selected=want_selected)
        exact_answers = iter(whole)
        other_answers = iter(
            self._budgeted(others, scale, softcap, want_selected) if others else []
        )
        return [next(exact_answers if rows.budget.exact else other_answers) for rows in batch]


def attend_whole(
    asked: Sequence[tuple[LayerKv, Sequence[IndexRows]]],
    scale: float,
    softcap: float = 0.0,
    *,
    want_selected: bool = False,
) -> list[list[IndexAnswer]]:
    """Attention of rows over every key of their scope, whatever their budget says.

    One kernel call however many K/V pairs are asked; answers per pair and entry, in order.
    """
    for _, batch in asked:
        for rows in batch:
            check_floor(rows)  # the kernel is not shown what an exact budget does not use
    pairs = [
        kernel.KvRows(kv.keys, kv.values, [kernel_rows(rows, kv) for rows in batch])
        for kv, batch in asked
    ]
    started = time.perf_counter()
    try:
        parts = kernel.attend_exact_pairs(pairs, scale, softcap)
    except ValueError:
        for kv, batch in asked:
            explain_refusal(batch, kv)
        raise
    share_s = (time.perf_counter() - started) / max(1, sum(len(batch) for _, batch in asked))
    return [
        [
            _whole_answer(rows, kv, partial, share_s, want_selected)
            for rows, partial in zip(batch, partials, strict=True)
        ]
        for (kv, batch), partials in zip(asked, parts, strict=True)
    ]


def _whole_answer(
    rows: IndexRows, kv: LayerKv, partial: PartialAttention, attend_s: float, want_selected: bool
) -> IndexAnswer:
    start, stop = local_bounds(rows.scope, kv)
    count, heads, _ = partial.lse.shape
    pairs = count * heads * (stop - start)
    read = pairs * kv.row_bytes
    work = WorkFigures(
        keys_in_scope=pairs,
        keys_scanned=pairs,
        keys_attended=pairs,
        bytes_read=read,
        bytes_in_scope=read,
        keys_covered=pairs,
    )
    selected = None
    if want_selected:
        selected = every_position(rows.queries, local_scope(rows, kv), kv.start)
    return IndexAnswer(partial, work, attend_s=attend_s, selected=selected)
