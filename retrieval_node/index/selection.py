"""Search, then attend: what every kind that searches for keys has in common.

A search proposes the best keys of each query head with their exact logits, best first. The budget
then keeps a prefix of that list, and softmax attention runs over the kept keys. Because the list is
sorted, every budget rule is the length of a prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longreach.types import (
    Budget,
    FloatArray,
    IntArray,
    PartialAttention,
    Span,
    StorageArray,
)

TAIL_SAMPLE = 1024
"""Keys of a scope sampled, evenly spaced, to estimate the attention mass a search did not find."""

GATHER_BYTES = 32 << 20
"""Most value bytes (fp32) gathered at a time."""


@dataclass(frozen=True, slots=True)
class Reads:
    """Full-precision key rows that a search read: distinct (row, key) pairs, and reads in all.

    A key read for two query heads of a group is one pair and, where a library searches query heads
    one by one, two reads.
    """

    distinct: int
    total: int

    def __add__(self, other: Reads) -> Reads:
        return Reads(self.distinct + other.distinct, self.total + other.total)


@dataclass(frozen=True, slots=True)
class Found:
    """Keys proposed for each of `q` queries of one KV head, best first.

    ids [q, width] int64 rows of the shard (-1 where fewer were found), logits [q, width] float32
    (exact, after scale and softcap; -inf where the id is -1).
    """

    ids: IntArray
    logits: FloatArray
    reads: Reads


@dataclass(frozen=True, slots=True)
class Sample:
    """Evenly spaced keys of a scope, standing for all the keys that a search did not list.

    ids [m] int64 ascending rows of the shard, logits [q, m] of each query, `scope_keys` the number
    of keys in the scope.
    """

    ids: IntArray
    logits: FloatArray
    scope_keys: int

    def unlisted(self, ids: IntArray, listed: np.ndarray) -> FloatArray:
        """Logits [q, m] with each sampled key weighted for the unlisted keys it stands for.

        `ids` [q, width] where `listed` [q, width] are the keys each query lists; those are left
        out (-inf), and the others share what remains of the scope equally.
        """
        slot = np.searchsorted(self.ids, ids).clip(max=len(self.ids) - 1)
        query, column = np.nonzero(listed & (self.ids[slot] == ids))
        left = np.ones(self.logits.shape, bool)
        left[query, slot[query, column]] = False
        remaining = self.scope_keys - np.count_nonzero(listed, axis=1)
        share = remaining / np.maximum(1, np.count_nonzero(left, axis=1))
        with np.errstate(divide="ignore"):
            weighted = self.logits + np.log(share, dtype=np.float32)[:, None]
        return np.asarray(np.where(left, weighted, -np.inf), np.float32)


def sampled_ids(scope: Span, most: int = TAIL_SAMPLE) -> IntArray:
    """At most `most` evenly spaced rows of a scope that is not empty."""
    count = min(len(scope), most)
    return scope.start + (np.arange(count, dtype=np.int64) * len(scope)) // count


def kept_counts(
    logits: FloatArray, budget: Budget, rest_lse: FloatArray, logit_floor: FloatArray | None = None
) -> IntArray:
    """Length of the prefix of sorted `logits` [q, width] that the budget keeps, [q].

    `rest_lse` [q] is the (estimated) log of the summed exponentials of the keys not listed; only
    the mass rule needs it. Keys under `logit_floor` [q] are dropped whatever the rule.
    """
    found: IntArray = np.asarray(np.count_nonzero(logits > -np.inf, axis=1))
    if budget.exact or logits.shape[1] == 0:
        return found
    if budget.top_k is not None:
        kept = np.minimum(found, budget.top_k)
    elif budget.mass is not None:
        kept = np.maximum(_mass_counts(logits, budget.mass, rest_lse), budget.floor)
        if budget.ceiling:
            kept = np.minimum(kept, budget.ceiling)
    else:
        lowest = logits[:, :1] - np.float32(budget.beta or 0.0)
        kept = np.count_nonzero(logits >= lowest, axis=1)
    if logit_floor is not None:
        kept = np.minimum(kept, np.count_nonzero(logits >= logit_floor[:, None], axis=1))
    return np.asarray(np.minimum(kept, found))


def _mass_counts(logits: FloatArray, mass: float, rest_lse: FloatArray) -> IntArray:
    top = logits[:, :1]
    safe = np.where(np.isfinite(top), top, np.float32(0))
    running = np.cumsum(np.exp(logits - safe, dtype=np.float64), axis=1)
    total = running[:, -1] + np.exp(rest_lse.astype(np.float64) - safe[:, 0])
    return np.asarray(np.count_nonzero(running < (mass * total)[:, None], axis=1) + 1)


def attend_kept(
    found: Found, kept: IntArray, values: StorageArray, tail: Sample | None = None
) -> PartialAttention:
    """Softmax attention of each query over its first `kept` [q] keys, and the tail if given.

    values [n, value_dim] of the KV head. Returns output [q, value_dim] and lse [q].
    """
    width = int(kept.max(initial=0))
    listed = np.arange(width) < kept[:, None]
    ids = np.where(listed, found.ids[:, :width], 0)
    logits = np.where(listed, found.logits[:, :width], np.float32(-np.inf))
    if tail is not None:
        logits = np.concatenate([logits, tail.unlisted(ids, listed)], axis=1)
    weights, lse = _softmax(logits)
    output = _weighted_values(weights[:, :width], ids, values)
    if tail is not None:
        output += weights[:, width:] @ np.asarray(values[tail.ids], np.float32)
    return PartialAttention(output, lse)


def log_sum_exp(logits: FloatArray) -> FloatArray:
    """Natural log of the summed exponentials over the last axis; -inf where there are none."""
    return _softmax(logits)[1]


def _softmax(logits: FloatArray) -> tuple[FloatArray, FloatArray]:
    top = logits.max(axis=1, initial=-np.inf)[:, None]
    safe = np.where(np.isfinite(top), top, np.float32(0))
    weights = np.exp(logits - safe, dtype=np.float32)
    total = weights.sum(axis=1, keepdims=True)
    weights /= np.where(total > 0, total, np.float32(1))
    with np.errstate(divide="ignore"):
        lse = np.log(total) + safe
    return weights, lse[:, 0].astype(np.float32)


def _weighted_values(weights: FloatArray, ids: IntArray, values: StorageArray) -> FloatArray:
    queries, width = weights.shape
    output = np.zeros((queries, values.shape[1]), np.float32)
    step = max(1, GATHER_BYTES // max(1, width * values.shape[1] * 4))
    for start in range(0, queries if width else 0, step):
        part = slice(start, start + step)
        gathered = np.asarray(values[ids[part]], np.float32)
        output[part] = np.matmul(weights[part, None], gathered)[:, 0]
    return output


def distinct_keys(ids: IntArray, kept: IntArray, group: int) -> int:
    """Number of distinct (row, key) pairs when each row has `group` consecutive queries."""
    width = int(kept.max(initial=0))
    row = np.arange(len(kept))[:, None] // group
    tagged = (row << 40) + ids[:, :width]
    return len(np.unique(tagged[np.arange(width) < kept[:, None]]))
