"""How good retrieval is in production: a sampled share of answers is compared with exact attention.

For a sampled Attend message, one query row and one KV head of it are attended over every key of the
scope, after the reply has left and on a thread of low priority, by the specification
(`longreach/attention.py`) rather than by the native code that gave the answer. Compared are

    recall        of the k keys with the highest logits, the share that joined the softmax; k is the
                  budget's top_k, or 100 for budgets that count no keys
    mass          share of the attention weight on the keys that joined the softmax
    output_error  |answer - exact| / |exact| of the output that was sent

each over what this node holds of the scope: the resident set, which the worker attends exactly, and
other nodes' shards take no part.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from longreach import telemetry
from longreach.attention import attention_logits, merge, softmax_partial
from longreach.types import FloatArray, PartialAttention
from retrieval_node.attend import AnsweredRow, RowPart
from retrieval_node.background import lower_priority
from retrieval_node.index.kernel_rows import local_scope

RECALL_KEYS = 100
"""Keys that recall is measured on where the budget counts none: RetrievalAttention's top-100."""
CPU_SHARE = 0.02
"""Most of one core's time that sampling may take; samples beyond it are dropped."""

_BLOCK_KEYS = 1024
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Quality:
    """One query row and KV head; arrays [group], a number for each of its query heads."""

    index_kind: str
    recall: FloatArray
    mass: FloatArray
    output_error: FloatArray


def measure(answered: AnsweredRow, row: int, head: int) -> Quality:
    """Compares what was answered for query row `row` and KV head `head`, both counted from the
    answer's first, with exact attention over the keys in scope."""
    group = answered.queries.shape[2]
    query = answered.queries[row, head]
    logits: list[FloatArray] = []
    kept: list[np.ndarray] = []
    partials: list[PartialAttention] = []
    for part in answered.parts:
        if 0 <= head - part.first_head < part.rows.queries.shape[1]:
            part_logits, partial = _exact(query, part, head, answered.scale, answered.softcap)
            logits.append(part_logits)
            partials.append(partial)
            kept.append(_kept(part, row, head, answered, part_logits.shape))
    every_logit, every_kept = np.concatenate(logits, axis=1), np.concatenate(kept, axis=1)
    exact = merge(partials)
    k = min(answered.budget.top_k or RECALL_KEYS, every_logit.shape[1])
    best = np.argpartition(-every_logit, k - 1, axis=1)[:, :k]
    weights = np.exp(every_logit - exact.lse[:, None])
    q_heads = slice(head * group, (head + 1) * group)
    distance = np.linalg.norm(answered.result.partial.output[row, q_heads] - exact.output, axis=1)
    length = np.linalg.norm(exact.output, axis=1)
    return Quality(
        answered.result.index_kind,
        np.take_along_axis(every_kept, best, axis=1).mean(axis=1, dtype=np.float32),
        np.where(every_kept, weights, np.float32(0)).sum(axis=1),
        distance / np.maximum(length, np.finfo(np.float32).tiny),
    )


def _exact(
    query: FloatArray, part: RowPart, head: int, scale: float, softcap: float
) -> tuple[FloatArray, PartialAttention]:
    """Logits [group, n] of a query [group, head_dim] over a part's scope, and its attention. Keys
    are read in small blocks: each holds the interpreter only for a moment."""
    held = part.rows.kv_head_start + head - part.first_head
    scope = local_scope(part.rows, part.kv)
    logits: list[FloatArray] = []
    partials: list[PartialAttention] = []
    for start in range(scope.start, scope.stop, _BLOCK_KEYS):
        block = slice(start, min(start + _BLOCK_KEYS, scope.stop))
        logits.append(attention_logits(query, part.kv.keys[held, block], scale, softcap))
        partials.append(softmax_partial(logits[-1], part.kv.values[held, block]))
    return np.concatenate(logits, axis=1), merge(partials)


def _kept(
    part: RowPart, row: int, head: int, answered: AnsweredRow, shape: tuple[int, ...]
) -> np.ndarray:
    """Which keys [group, n] of a part's scope joined the softmax. The index is asked again, which
    gives what it gave before: indexes are immutable."""
    if part.index is None:
        return np.ones(shape, bool)
    inside = head - part.first_head
    asked = part.rows._replace(
        queries=part.rows.queries[row : row + 1, inside : inside + 1],
        kv_head_start=part.rows.kv_head_start + inside,
        logit_floor=(
            None
            if part.rows.logit_floor is None
            else part.rows.logit_floor[row : row + 1, inside : inside + 1]
        ),
    )
    [answer] = part.index.attend([asked], answered.scale, answered.softcap, want_selected=True)
    assert answer.selected is not None
    first = part.kv.start + local_scope(part.rows, part.kv).start
    kept = np.zeros(shape, bool)
    for number, positions in enumerate(answer.selected[0][0]):
        kept[number, positions - first] = True
    return kept


class QualitySampler:
    """Draws samples on the token path and measures them on a thread of its own.

    `share` is that of Attend messages that are sampled, in [0, 1]; `report` is told of each
    measurement, `dropped` of each sample that came while another was at work or beyond CPU_SHARE.
    The keys of a sample stay in memory until it is measured, even when their context is dropped.
    """

    def __init__(
        self,
        share: float,
        report: Callable[[Quality], None],
        dropped: Callable[[], None],
        *,
        cpu_share: float = CPU_SHARE,
    ) -> None:
        self._share = share
        self._report = report
        self._dropped = dropped
        self._pause_per_s = 1 / cpu_share - 1
        self._random = random.Random()
        self._waiting: queue.Queue[tuple[AnsweredRow, int, int] | None] = queue.Queue(1)
        self._free = threading.Event()
        self._free.set()
        self._resume_at = 0.0
        self._thread = threading.Thread(target=self._run, name="quality", daemon=True)
        self._thread.start()

    def draw(self) -> Callable[[Sequence[AnsweredRow]], None] | None:
        """What to hand the answers of an Attend message to; None when it is not sampled."""
        if self._random.random() >= self._share:
            return None
        if not self._free.is_set() or time.monotonic() < self._resume_at:
            self._dropped()
            return None
        return self._take

    def close(self) -> None:
        """Stops; a measurement at work is finished."""
        self._share = 0.0
        self._waiting.put(None)
        self._thread.join()

    def _take(self, answers: Sequence[AnsweredRow]) -> None:
        approximate = [each for each in answers if _is_approximate(each)]
        if not approximate:
            return
        answered = self._random.choice(approximate)
        # A question's rows see nearly the same keys; the last is the one that is decoded from.
        row = answered.queries.shape[0] - 1
        indexed = [part for part in answered.parts if part.index is not None]
        part = self._random.choice(indexed)
        head = part.first_head + self._random.randrange(part.rows.queries.shape[1])
        self._free.clear()
        try:
            self._waiting.put_nowait((answered, row, head))
        except queue.Full:  # two messages were drawn at once
            self._dropped()

    def _run(self) -> None:
        lower_priority()
        while (sample := self._waiting.get()) is not None:
            began = time.monotonic()
            try:
                self._report(measure(*sample))
            except Exception:
                _LOG.exception("a sampled answer could not be compared with exact attention")
            del sample  # or its keys would live until the next one
            took_s = time.monotonic() - began
            self._resume_at = time.monotonic() + took_s * self._pause_per_s
            self._free.set()


def sampler_with_metrics(share: float) -> QualitySampler:
    """A sampler whose measurements become metrics: an observation for each query head."""
    histograms = [
        (telemetry.histogram(f"retrieval_{name}_sampled"), attrgetter(name))
        for name in ("recall", "mass", "output_error")
    ]
    samples = telemetry.counter("retrieval_quality_samples")
    done, dropped = samples.bind(result="done"), samples.bind(result="dropped")

    def report(found: Quality) -> None:
        for histogram, values in histograms:
            series = histogram.bind(index_kind=found.index_kind)
            for value in values(found).tolist():
                series.record(value)
        done.add()

    return QualitySampler(share, report, dropped.add)


def _is_approximate(answered: AnsweredRow) -> bool:
    return not answered.budget.exact and any(part.index is not None for part in answered.parts)
