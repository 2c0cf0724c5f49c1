"""What the kinds built on faiss share: centred keys, bounded threads, cancellable builds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import faiss as _typed_faiss
import numpy as np

from longreach.errors import Cancelled, InvalidRequest
from longreach.types import FloatArray, IntArray, QuerySample, Span, StorageArray
from retrieval_node.index.base import BuildControl, LayerKv
from retrieval_node.index.search import SearchIndex
from retrieval_node.index.selection import Found, Reads

faiss: Any = _typed_faiss
"""faiss without its type stubs, which lack most of what is used here."""

ADD_ROWS = 4096
"""Keys added to an index at a time; cancellation is checked between."""


@contextmanager
def faiss_threads(threads: int) -> Iterator[None]:
    """Bound the OpenMP threads of faiss calls made by this thread; other threads keep theirs."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def centred_keys(keys: StorageArray) -> tuple[FloatArray, FloatArray]:
    """Keys [n, head_dim] less their mean, and the mean [head_dim], fp32.

    q·mean is the same for every key, so the ranking does not change, but graphs and clusters over
    inner products degenerate when all keys share a large mean. Raises InvalidRequest, reason
    KEYS_NOT_FINITE, when a key holds NaN or infinity.
    """
    full = np.asarray(keys, np.float32)
    mean = full.mean(axis=0, dtype=np.float64).astype(np.float32)
    check_mean(mean, full)
    return full - mean, mean


def check_mean(mean: FloatArray, keys: FloatArray) -> None:
    """Raises InvalidRequest, naming the key, when the mean shows that one is NaN or infinite."""
    if len(keys) and not np.isfinite(mean).all():
        bad = int(np.flatnonzero(~np.isfinite(keys).all(axis=1))[0])
        raise InvalidRequest(
            f"key {bad} holds NaN or infinity; an index needs finite keys",
            reason="KEYS_NOT_FINITE",
        )


class FaissIndex(SearchIndex):
    """One faiss index per KV head over centred keys, searched by inner product.

    Searches run in the calling thread alone, so that a node's threads are its own to share out.
    """

    format_version: ClassVar[int] = 1

    def __init__(self, kv: LayerKv, heads: list[Any], means: list[FloatArray]) -> None:
        super().__init__(kv)
        self._heads = heads
        self._means = means

    @classmethod
    def build(cls, kv: LayerKv, sample: QuerySample | None, control: BuildControl) -> Self:
        """Index every KV head in turn; raises Cancelled between runs of keys when asked to stop."""
        heads: list[Any] = []
        means: list[FloatArray] = []
        with faiss_threads(control.threads):
            for head in range(kv.kv_heads):
                keys, mean = centred_keys(kv.keys[head])
                index = cls.empty_head(keys)
                for start in range(0, len(keys), ADD_ROWS):
                    if control.cancelled.is_set():
                        raise Cancelled(
                            f"build of {cls.kind} stopped at KV head {head} of {kv.kv_heads}, "
                            f"key {start} of {len(keys)}"
                        )
                    index.add(keys[start : start + ADD_ROWS])
                heads.append(index)
                means.append(mean)
                control.progress(head + 1, kv.kv_heads)
        return cls(kv, heads, means)

    def arrays(self) -> dict[str, np.ndarray]:
        """The library's own serialised form of each KV head's index, and the mean keys."""
        arrays: dict[str, np.ndarray] = {"means": np.array(self._means, np.float32)}
        for head, index in enumerate(self._heads):
            arrays[f"faiss.{head}"] = faiss.serialize_index(index)
        return arrays

    @classmethod
    def restore(cls, kv: LayerKv, arrays: Mapping[str, np.ndarray]) -> Self:
        """See Index.restore."""
        heads, keys, dim = kv.keys.shape
        means = arrays["means"]
        if means.shape != (heads, dim):
            raise ValueError(f"mean keys are {means.shape}; expected {(heads, dim)}")
        try:
            indexes = [faiss.deserialize_index(arrays[f"faiss.{head}"]) for head in range(heads)]
        except RuntimeError as error:
            raise ValueError(f"faiss cannot read its index: {error}") from error
        for index in indexes:
            if (index.ntotal, index.d) != (keys, dim):
                raise ValueError(
                    f"the library's index holds {index.ntotal} keys of {index.d} dimensions; "
                    f"expected {keys} of {dim}"
                )
        return cls(kv, indexes, list(means))

    @classmethod
    @abstractmethod
    def empty_head(cls, keys: FloatArray) -> Any:
        """A trained, empty faiss index for centred keys [n, head_dim]."""

    @abstractmethod
    def library_search(
        self, head: int, queries: FloatArray, group: int, width: int, scope: Span
    ) -> tuple[FloatArray, IntArray, Reads]:
        """faiss's scores [q, width] over centred keys, ids (-1: none), and what it read."""

    def search(self, head: int, queries: FloatArray, group: int, width: int, scope: Span) -> Found:
        """See SearchIndex.search."""
        with faiss_threads(1):
            scores, ids, reads = self.library_search(head, queries, group, width, scope)
        offset = queries @ self._means[head]
        scores = np.where(ids >= 0, scores + offset[:, None], np.float32(-np.inf))
        return Found(ids, scores, reads)

    @property
    def scanned_row_bytes(self) -> int:
        """The library keeps its own fp32 copy of the keys."""
        return int(self._kv.keys.shape[2]) * 4
