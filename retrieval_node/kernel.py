"""The native kernels, with NumPy arrays in and out.

A thin face of the compiled module `retrieval_node._native`: it allocates outputs and turns domain
types into flat arguments. Calls release the GIL and run on the module's thread pool. There is no
fallback: without the module this file does not import, and the error says how to build it.

The instruction-set tier ("scalar", "avx2", "avx512" or "amx") is the best one the CPU has; the
environment variable LONGREACH_ISA forces one.

What a call on the token path makes is a NamedTuple: a frozen dataclass takes several times as long
to make, and more so with cold caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from longreach.types import (
    STORAGE_DTYPES,
    Budget,
    FloatArray,
    IntArray,
    PartialAttention,
    StorageArray,
)
from retrieval_node.aligned import aligned_empty

try:
    import retrieval_node._native as _native
except ImportError as error:
    raise ImportError(
        f"the retrieval node's native module did not load ({error}). Build it with: "
        "pip install scikit-build-core==1.1.2 nanobind==3.1.0 && "
        "pip install --no-build-isolation -e . (needs a C++17 compiler: apt-get install g++)"
    ) from error


EXACT = Budget(exact=True)

CODE_KEYS = 16
"""Keys of a code block."""

SUMMARY_KEYS = 64
"""Keys of a value summary."""


class KernelRows(NamedTuple):
    """Rows that share a scope and a budget.

    queries [rows, heads, group, head_dim] float32 for KV heads from `kv_head_start` on, counted
    from the first head of the keys; `start` and `stop` bound the scope, counted from the first key.
    `logit_floor` [rows, heads, group]: logits below which keys are dropped, unless the budget is
    exact.
    """

    queries: FloatArray
    kv_head_start: int
    start: int
    stop: int
    budget: Budget = EXACT
    logit_floor: FloatArray | None = None


Figures = tuple[int, int, int, int, int, int, int]
"""What an entry cost, summed over its rows and KV heads: key rows read, keys scored by a code, keys
in the softmax of at least one query head of the group, value summaries read, bytes of codes read,
and the nanoseconds that threads searched and attended."""


class Entry(NamedTuple):
    """Rows under a budget as the module reads them, with room for their answer.

    output [rows, heads, group, value_dim] and lse [rows, heads, group] float32 are filled in; the
    module copies queries and floors that are not dense float32.
    """

    queries: FloatArray
    kv_head_start: int
    start: int
    stop: int
    output: FloatArray
    lse: FloatArray
    budget: tuple[int, int, float, int, int, float, bool]
    logit_floor: FloatArray | None


Results = tuple[list[Figures], list[list[np.ndarray]]]
"""What a call tells of its entries beside their answers: the Figures of each, and, when they are
wanted, the kept keys (counted from the first) of each (row, head, query head), flattened."""


def isa() -> str:
    """Name of the instruction-set tier in use."""
    return str(_native.isa())


def supported_isas() -> list[str]:
    """Tiers this CPU can run, slowest first."""
    return list(_native.supported_isas())


def set_isa(name: str) -> None:
    """Use the named tier from now on; ValueError if it is unknown or the CPU lacks it."""
    _native.set_isa(name)


def set_threads(threads: int, *, pin: bool = False) -> None:
    """Size of the thread pool, the calling thread included; `pin` binds threads to CPUs."""
    _native.set_threads(threads, pin)


def threads() -> int:
    """Size of the thread pool."""
    return int(_native.threads())


@dataclass(frozen=True, slots=True)
class KvRows:
    """K and V of one layer, and the rows that read them.

    keys [kv_heads, n, head_dim], values [kv_heads, n, value_dim], one storage dtype; they may be
    views whose last axis is dense.
    """

    keys: StorageArray
    values: StorageArray
    batch: Sequence[KernelRows]


def attend_exact(
    keys: StorageArray,
    values: StorageArray,
    batch: Sequence[KernelRows],
    scale: float,
    softcap: float = 0.0,
) -> list[PartialAttention]:
    """`attend_exact_pairs` for rows that all read the same K and V."""
    [parts] = attend_exact_pairs([KvRows(keys, values, batch)], scale, softcap)
    return parts


def attend_exact_pairs(
    pairs: Sequence[KvRows], scale: float, softcap: float = 0.0
) -> list[list[PartialAttention]]:
    """Exact attention of each pair's rows over its own K and V: one call into the module.

    Pairs may differ in everything: length, heads, dimensions and dtype. Returns, per pair, output
    [rows, heads, group, value_dim] and lse [rows, heads, group] of each entry. Raises ValueError
    when shapes or scopes do not fit; no pair is answered then.
    """
    answers = [
        [_empty(rows.queries, pair.values.shape[-1]) for rows in pair.batch] for pair in pairs
    ]
    given = [
        (*_storage(pair.keys, pair.values), _exact_entries(pair.batch, parts))
        for pair, parts in zip(pairs, answers, strict=True)
    ]
    _native.attend_exact(given, scale, softcap)
    return answers


def entry(
    queries: FloatArray,
    kv_head_start: int,
    start: int,
    stop: int,
    budget: Budget,
    logit_floor: FloatArray | None,
    value_dim: int,
) -> Entry:
    """An entry for rows given as in KernelRows."""
    leading = queries.shape[:-1]
    output, lse = np.empty((*leading, value_dim), np.float32), np.empty(leading, np.float32)
    flat = _budget(budget)
    return Entry(queries, kv_head_start, start, stop, output, lse, flat, logit_floor)


def attend_scope(
    keys: StorageArray,
    values: StorageArray,
    entries: Sequence[Entry],
    scale: float,
    softcap: float = 0.0,
    want_selected: bool = False,
) -> Results:
    """Each entry's budget over every key of its scope: the exact answer to the budget.

    Ties at a budget's edge go to the earlier key. Raises ValueError as `attend_exact` does.
    """
    results: Results = _native.attend_scope(
        *_storage(keys, values), entries, scale, softcap, want_selected
    )
    return results


def attend_candidates(
    keys: StorageArray,
    values: StorageArray,
    entries: Sequence[Entry],
    candidates: Sequence[tuple[IntArray, np.ndarray]],
    scale: float,
    softcap: float = 0.0,
    want_selected: bool = False,
) -> Results:
    """Each entry's budget over the keys a search proposed for each (row, head).

    `candidates` holds, per entry, offsets [rows * heads + 1] int64 and ids int32: those of (row,
    head) are ids[offsets[i]:offsets[i + 1]] with i = row * heads + head, ascending, without
    repeats, within the scope. Every query head of the group is scored against all of them.
    """
    given = [
        (np.ascontiguousarray(offsets, np.int64), np.ascontiguousarray(ids, np.int32))
        for offsets, ids in candidates
    ]
    results: Results = _native.attend_candidates(
        *_storage(keys, values), entries, given, scale, softcap, want_selected
    )
    return results


@dataclass(frozen=True, slots=True)
class SketchCode:
    """The sketch of one KV head, as the module reads it.

    A code has 4 * `eight` dimensions of 8 bits and 8 * `four` of 4 bits; `codes` [bytes] holds them
    in transposed blocks of 16 keys, `summaries` [ceil(n / 64), value_dim] bfloat16 bits the mean
    value of each 64 keys. `model` float32 is, one after another: the transform [head_dim + 1,
    head_dim] of queries (its last row is the mean key), then step, low and noise of each code
    dimension and the variance [head_dim] of each whitened key dimension.
    """

    eight: int
    four: int
    codes: np.ndarray
    summaries: np.ndarray
    model: FloatArray

    @property
    def key_bytes(self) -> int:
        """Bytes of one key's code."""
        return 4 * (self.eight + self.four)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self.codes.nbytes + self.summaries.nbytes + self.model.nbytes)


def encode_sketch(
    keys: StorageArray,
    values: StorageArray,
    eight: int,
    four: int,
    weights: FloatArray,
    bias: FloatArray,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and value summaries of one head's keys [n, head_dim] and values [n, value_dim].

    Dimension i of a code is floor(weights[i] . key + bias[i]), clipped to its bits; weights [4 *
    eight + 8 * four, head_dim]. Raises ValueError, naming the key, if one holds NaN or infinity.
    """
    n = keys.shape[0]
    codes = aligned_empty((-(-n // CODE_KEYS) * CODE_KEYS * 4 * (eight + four),), np.uint8)
    summaries = aligned_empty((-(-n // SUMMARY_KEYS), values.shape[1]), np.uint16)
    bad = _native.encode_sketch(
        *_storage(keys[None], values[None]),
        eight,
        four,
        _floats(weights),
        _floats(bias),
        codes,
        summaries,
    )
    if bad >= 0:
        raise ValueError(f"key {bad} holds NaN or infinity; a sketch needs finite keys")
    return codes, summaries


class SketchLayer:
    """K, V and the sketches of a layer's KV heads, handed to the module once.

    `attend(entries, scale, softcap, want_selected)` answers each entry's budget over the keys that
    the sketches find; they are scored exactly before the budget applies. With a tail estimate, all
    keys found join the softmax (what was read exactly beats its estimate) and the others stand in
    by their codes and the mean value of their 64 keys.
    """

    attend: Callable[[Sequence[Entry], float, float, bool], Results]
    """The module's own method: a call on the token path comes with cold caches, where every Python
    object touched counts."""

    def __init__(
        self, keys: StorageArray, values: StorageArray, heads: Sequence[SketchCode]
    ) -> None:
        codes = [(head.eight, head.four, head.codes, head.summaries, head.model) for head in heads]
        self.attend = _native.SketchLayer(*_storage(keys, values), codes).attend


def _exact_entries(batch: Sequence[KernelRows], parts: Sequence[PartialAttention]) -> list[Any]:
    return [
        (rows.queries, rows.kv_head_start, rows.start, rows.stop, part.output, part.lse)
        for rows, part in zip(batch, parts, strict=True)
    ]


def _budget(budget: Budget) -> tuple[int, int, float, int, int, float, bool]:
    """The budget as flat numbers; the rule is 0 exact, 1 top_k, 2 mass, 3 beta."""
    floor, ceiling, tail = budget.floor, budget.ceiling, budget.tail_estimate
    if budget.top_k is not None:
        return 1, budget.top_k, 0.0, floor, ceiling, 0.0, tail
    if budget.mass is not None:
        return 2, 0, budget.mass, floor, ceiling, 0.0, tail
    if budget.beta is not None:
        return 3, 0, 0.0, floor, ceiling, budget.beta, tail
    return 0, 0, 0.0, floor, ceiling, 0.0, tail


def _empty(queries: FloatArray, value_dim: int) -> PartialAttention:
    leading = queries.shape[:-1]
    return PartialAttention(
        np.empty((*leading, value_dim), np.float32), np.empty(leading, np.float32)
    )


def _floats(array: FloatArray) -> FloatArray:
    return np.ascontiguousarray(array, np.float32)


def _storage(keys: StorageArray, values: StorageArray) -> tuple[StorageArray, StorageArray, str]:
    """K and V as the module reads them (16-bit floats as their bits) and their dtype's name."""
    if keys.dtype != values.dtype or keys.dtype not in STORAGE_DTYPES:
        raise ValueError(
            f"keys are {keys.dtype} and values {values.dtype}; both must be one of "
            + ", ".join(dtype.name for dtype in STORAGE_DTYPES)
        )
    if keys.dtype.itemsize == 2:
        return keys.view(np.uint16), values.view(np.uint16), keys.dtype.name
    return keys, values, keys.dtype.name
