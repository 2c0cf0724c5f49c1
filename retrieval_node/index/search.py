"""Base of the kinds that search each KV head with a library and attend over what was found."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from longreach.attention import attention_logits, empty_partial
from longreach.types import (
    FloatArray,
    IntArray,
    PartialAttention,
    Span,
    WorkFigures,
    total_work,
)
from retrieval_node.index.base import (
    INDEX_KINDS,
    BuildControl,
    Index,
    IndexAnswer,
    IndexRows,
    LayerKv,
)
from retrieval_node.index.kernel_rows import check_rows, local_scope
from retrieval_node.index.selection import (
    Found,
    Reads,
    Sample,
    attend_kept,
    distinct_keys,
    kept_counts,
    log_sum_exp,
    sampled_ids,
)

FIRST_WIDTH = 128
"""Keys asked of the first search when the budget does not name a number."""

WIDEN = 4
"""Factor between one search and the next while a mass or beta rule is not met."""


@dataclass(frozen=True, slots=True)
class Logits:
    """How inner products become logits: scale, then softcap when it is above 0."""

    scale: float
    softcap: float

    def of_scores(self, scores: FloatArray) -> FloatArray:
        """Logits of inner products q·k; -inf stays -inf."""
        logits = scores * np.float32(self.scale)
        if self.softcap > 0:
            capped = np.float32(self.softcap) * np.tanh(logits / np.float32(self.softcap))
            logits = np.where(np.isfinite(logits), capped, logits)
        return np.asarray(logits, np.float32)


@dataclass(frozen=True, slots=True)
class HeadAnswer:
    """Attention of the queries [rows * group] of one KV head, with what was kept and read."""

    partial: PartialAttention
    kept_ids: list[np.ndarray]
    work: WorkFigures
    search_s: float
    attend_s: float


def flat_index(kv: LayerKv) -> Index:
    """The exact kind over `kv`; it needs no build."""
    control = BuildControl(progress=lambda built, total: None, cancelled=threading.Event())
    return INDEX_KINDS["flat"].build(kv, None, control)


class SearchIndex(Index):
    """Searches each KV head for the best keys, applies the budget, attends exactly over the rest.

    Exact budgets, and scopes so narrow that reading them costs less than searching, go to the
    `flat` kind. Rules that do not name a number of keys (mass, beta) search wider until the rule
    is met inside what was found. The attention mass that no search found, and the tail estimate,
    come from an evenly spaced sample of the scope (as vAttention's, arXiv 2510.05688).

    The libraries behind these kinds hold one index per KV head and answer one head per call, so
    `attend` loops over heads; kinds with a kernel of their own take all heads in one call.
    """

    exact_scope: ClassVar[int] = 4096
    """Scopes of at most this many keys are attended by `flat`."""

    def __init__(self, kv: LayerKv) -> None:
        self._kv = kv
        self._flat = flat_index(kv)

    @abstractmethod
    def search(self, head: int, queries: FloatArray, group: int, width: int, scope: Span) -> Found:
        """The `width` best keys of `queries` [q, head_dim] for a KV head, among the rows in scope.

        Every `group` consecutive queries are the query heads of one row.
        `Found.logits` holds inner products with the stored keys; the caller turns them to logits.
        """

    def narrow(self, scope: Span, width: int) -> bool:
        """Whether attending over the whole scope costs less than searching `width` keys in it."""
        return len(scope) <= max(self.exact_scope, 2 * width)

    def attend(
        self,
        batch: Sequence[IndexRows],
        scale: float,
        softcap: float = 0.0,
        *,
        want_selected: bool = False,
    ) -> list[IndexAnswer]:
        """See Index.attend."""
        to_logits = Logits(scale, softcap)
        return [self._answer(rows, to_logits, want_selected) for rows in batch]

    def _answer(self, rows: IndexRows, to_logits: Logits, want_selected: bool) -> IndexAnswer:
        check_rows(rows, self._kv)
        scope = local_scope(rows, self._kv)
        if not rows.budget.exact and not self.narrow(scope, first_width(rows)):
            answers = []
            for head in range(rows.queries.shape[1]):
                answer = self._head(rows, head, scope, to_logits)
                if answer is None:
                    break
                answers.append(answer)
            else:
                return _joined(rows, answers, self._kv, want_selected)
        return self._flat.attend(
            [rows], to_logits.scale, to_logits.softcap, want_selected=want_selected
        )[0]

    def _head(
        self, rows: IndexRows, head: int, scope: Span, to_logits: Logits
    ) -> HeadAnswer | None:
        """One KV head's answer; None when the budget needs more keys than are worth a search."""
        count, _, group, dim = rows.queries.shape
        queries = np.ascontiguousarray(rows.queries[:, head]).reshape(count * group, dim)
        floor = None if rows.logit_floor is None else rows.logit_floor[:, head].reshape(-1)
        stored = rows.kv_head_start + head
        started = time.perf_counter()
        sample = None
        if rows.budget.mass is not None or rows.budget.tail_estimate:
            sample = self._sample(stored, queries, scope, to_logits)
        kept_found = self._widening(stored, queries, rows, scope, to_logits, sample, floor)
        if kept_found is None:
            return None
        found, kept = kept_found
        searched = time.perf_counter()
        tail = sample if rows.budget.tail_estimate else None
        partial = attend_kept(found, kept, self._kv.values[stored], tail)
        attended = time.perf_counter()
        ids = [line[:keep] for line, keep in zip(found.ids, kept, strict=True)]
        work = self._work(count, scope, found, kept, group, sample)
        return HeadAnswer(partial, ids, work, searched - started, attended - searched)

    def _widening(
        self,
        head: int,
        queries: FloatArray,
        rows: IndexRows,
        scope: Span,
        to_logits: Logits,
        sample: Sample | None,
        floor: FloatArray | None,
    ) -> tuple[Found, IntArray] | None:
        """Search until the rule is met: what was found and how much of it is kept.

        None when the rule is not met before the search is no longer worth it.
        """
        budget, group = rows.budget, rows.queries.shape[2]
        width = first_width(rows)
        most = min(budget.top_k or budget.ceiling or len(scope), len(scope))
        reads = Reads(0, 0)
        while True:
            scores = self.search(head, queries, group, width, scope)
            reads += scores.reads
            found = Found(scores.ids, to_logits.of_scores(scores.logits), reads)
            rest_lse = np.full(len(queries), -np.inf, np.float32)
            if sample is not None:
                rest_lse = log_sum_exp(sample.unlisted(found.ids, found.ids >= 0))
            kept = kept_counts(found.logits, budget, rest_lse, floor)
            if width >= most or bool((kept < width).all()):
                return found, kept
            width = min(most, width * WIDEN)
            if self.narrow(scope, width):
                return None

    def _sample(self, head: int, queries: FloatArray, scope: Span, to_logits: Logits) -> Sample:
        ids = sampled_ids(scope)
        keys = self._kv.keys[head][ids]
        logits = attention_logits(queries, keys, to_logits.scale, to_logits.softcap)
        return Sample(ids, logits, len(scope))

    def _work(
        self,
        count: int,
        scope: Span,
        found: Found,
        kept: IntArray,
        group: int,
        sample: Sample | None,
    ) -> WorkFigures:
        value_bytes = self._kv.values.shape[2] * self._kv.values.itemsize
        key_bytes = self._kv.row_bytes - value_bytes
        distinct = found.reads.distinct
        read = found.reads.total * self.scanned_row_bytes + int(kept.sum()) * value_bytes
        if sample is not None:
            distinct += count * len(sample.ids)
            read += len(sample.ids) * (key_bytes + value_bytes)
        return WorkFigures(
            keys_in_scope=count * len(scope),
            keys_scanned=min(distinct, count * len(self._kv.positions)),
            keys_attended=distinct_keys(found.ids, kept, group),
            bytes_read=read,
            bytes_in_scope=count * len(scope) * self._kv.row_bytes,
            keys_covered=count * len(scope),
        )

    @property
    @abstractmethod
    def scanned_row_bytes(self) -> int:
        """Bytes the library reads for each key it scans."""


def first_width(rows: IndexRows) -> int:
    """How many keys the first search of these rows asks for."""
    budget = rows.budget
    width = budget.top_k or max(budget.floor, FIRST_WIDTH)
    return min(width, budget.ceiling) if budget.ceiling else width


def _joined(
    rows: IndexRows, answers: list[HeadAnswer], kv: LayerKv, want_selected: bool
) -> IndexAnswer:
    """One answer from those of the heads."""
    count, heads, group, _ = rows.queries.shape
    if not answers:
        return IndexAnswer(empty_partial((count, 0, group), kv.values.shape[2]), WorkFigures())
    output = np.stack([a.partial.output.reshape(count, group, -1) for a in answers], axis=1)
    lse = np.stack([a.partial.lse.reshape(count, group) for a in answers], axis=1)
    selected = None
    if want_selected:
        selected = [
            [
                [answers[h].kept_ids[r * group + g] + kv.start for g in range(group)]
                for h in range(heads)
            ]
            for r in range(count)
        ]
    return IndexAnswer(
        PartialAttention(output, lse),
        total_work([a.work for a in answers]),
        sum(a.search_s for a in answers),
        sum(a.attend_s for a in answers),
        selected,
    )
