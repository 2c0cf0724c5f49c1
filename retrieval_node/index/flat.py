"""Kind `flat`: reads every key of the scope; the exact answer to every budget.

It needs no build, so a shard answers with it as soon as it is sealed. With an exact budget, K and V
stream through one pass of flash-style attention; with any other, keys are scored, the budget keeps
some of them, and their values are gathered: the exact k nearest neighbours that the other kinds
approximate.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from longreach.types import PartialAttention, QuerySample
from retrieval_node import kernel
from retrieval_node.index.base import (
    INDEX_KINDS,
    BuildControl,
    Index,
    IndexAnswer,
    IndexRows,
    LayerKv,
)
from retrieval_node.index.kernel_rows import (
    answer_by_budget,
    call_kernel,
    every_position,
    explain_refusal,
    index_answer,
    kernel_rows,
    local_scope,
    work_in_scope,
)


@INDEX_KINDS.register("flat")
class FlatIndex(Index):
    """Exact attention, or the exact best keys under a budget."""

    kind: ClassVar[str] = "flat"
    needs_build: ClassVar[bool] = False

    def __init__(self, kv: LayerKv) -> None:
        self._kv = kv

    @classmethod
    def build(cls, kv: LayerKv, sample: QuerySample | None, control: BuildControl) -> FlatIndex:
        """At once; the sample is not used."""
        control.progress(kv.kv_heads, kv.kv_heads)
        return cls(kv)

    def attend(
        self,
        batch: Sequence[IndexRows],
        scale: float,
        softcap: float = 0.0,
        *,
        want_selected: bool = False,
    ) -> list[IndexAnswer]:
        """See Index.attend: one kernel call for exact entries, one for those with a budget."""
        return answer_by_budget(
            batch,
            lambda rows: self._exact(rows, scale, softcap, want_selected),
            lambda rows: self._best(rows, scale, softcap, want_selected),
        )

    @property
    def index_bytes(self) -> int:
        """Nothing beside K and V."""
        return 0

    def _exact(
        self, batch: Sequence[IndexRows], scale: float, softcap: float, want_selected: bool
    ) -> list[IndexAnswer]:
        [answers] = attend_whole([(self._kv, batch)], scale, softcap, want_selected=want_selected)
        return answers

    def _best(
        self, batch: Sequence[IndexRows], scale: float, softcap: float, want_selected: bool
    ) -> list[IndexAnswer]:
        kv = self._kv
        answers = call_kernel(
            batch,
            kv,
            lambda rows: kernel.attend_scope(
                kv.keys, kv.values, rows, scale, softcap, want_selected=want_selected
            ),
        )
        return [index_answer(rows, kv, answer) for rows, answer in zip(batch, answers, strict=True)]


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
    scope = work_in_scope(rows, kv)
    work = replace(
        scope,
        keys_scanned=scope.keys_in_scope,
        keys_attended=scope.keys_in_scope,
        bytes_read=scope.bytes_in_scope,
    )
    selected = None
    if want_selected:
        selected = every_position(rows.queries, local_scope(rows, kv), kv.start)
    return IndexAnswer(partial, work, attend_s=attend_s, selected=selected)
