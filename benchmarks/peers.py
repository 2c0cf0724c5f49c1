"""The vector-search libraries that longreach's indexes are measured against.

Each searches one KV head for the 100 best keys of every query head of a group, on one thread;
attention over what they find is not part of their time. Graphs and clusters get centred keys, as
ours do. Built indexes are kept on disk by configuration, because some take minutes to build.
"""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import faiss as _typed_faiss
import numpy as np

from longreach.types import FloatArray

faiss: Any = _typed_faiss

TOP = 100
"""Keys asked for."""


class Peer(ABC):
    """One configuration of one library over keys [n, d] fp32.

    `settings` are the search widths to try, cheapest first.
    """

    name: ClassVar[str]
    quick: ClassVar[bool] = False
    """Built in seconds, so a quick run builds it; the others join a quick run from the cache."""
    settings: ClassVar[Sequence[int]]

    def __init__(self, keys: int, dim: int) -> None:
        self.keys = keys
        self.dim = dim
        self.index: Any = None
        self.build_cpu_s = 0.0

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What decides how the index is built."""

    @abstractmethod
    def build(self, keys: FloatArray) -> Any:
        """The index over the keys."""

    @abstractmethod
    def search(self, queries: FloatArray, setting: int) -> np.ndarray:
        """Ids [q, TOP] of the best keys of queries [q, d], on the calling thread."""

    @abstractmethod
    def write(self, path: Path) -> None:
        """Write the index."""

    @abstractmethod
    def read(self, path: Path) -> Any:
        """The index that `write` wrote."""

    @property
    def bytes_per_key(self) -> float:
        """Size of the index's file per key; keys that the library needs to hold are in it."""
        return self._bytes / self.keys

    def path(self, directory: Path, data: str) -> Path:
        """Where the index over a data set is kept."""
        text = json.dumps({"data": data, "peer": self.name, **self.config}, sort_keys=True)
        return directory / f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.index"

    def prepare(self, directory: Path, data: str, keys: FloatArray) -> None:
        """Read the index from the cache, or build it and write it there."""
        path = self.path(directory, data)
        times = path.with_suffix(".json")
        if path.exists() and times.exists():
            self.index = self.read(path)
            self.build_cpu_s = json.loads(times.read_text())["build_cpu_s"]
        else:
            started = time.process_time()
            self.index = self.build(keys)
            self.build_cpu_s = time.process_time() - started
            directory.mkdir(parents=True, exist_ok=True)
            self.write(path)
            times.write_text(json.dumps({"build_cpu_s": self.build_cpu_s, **self.config}))
        self._bytes = path.stat().st_size


class FaissPeer(Peer):
    """What faiss's peers share."""

    def write(self, path: Path) -> None:
        """See Peer.write."""
        faiss.write_index(self.index, str(path))

    def read(self, path: Path) -> Any:
        """See Peer.read."""
        return faiss.read_index(str(path))


class Flat(FaissPeer):
    """Exact search over fp32 keys."""

    name = "faiss Flat"
    quick = True
    settings = (0,)

    @property
    def config(self) -> dict[str, Any]:
        """See Peer.config."""
        return {}

    def build(self, keys: FloatArray) -> Any:
        """See Peer.build."""
        index = faiss.IndexFlatIP(self.dim)
        index.add(keys)
        return index

    def search(self, queries: FloatArray, setting: int) -> np.ndarray:
        """See Peer.search."""
        return np.asarray(self.index.search(queries, TOP)[1])


class Ivf(FaissPeer):
    """Inverted file; the setting is the number of cells probed."""

    name = "faiss IVF"
    quick = True
    settings = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)

    @property
    def config(self) -> dict[str, Any]:
        """See Peer.config."""
        cells = 256 if self.keys <= 32_768 else 1024 if self.keys <= 262_144 else 4096
        return {"cells": cells, "iterations": 10}

    def build(self, keys: FloatArray) -> Any:
        """See Peer.build."""
        self._quantizer = faiss.IndexFlatIP(self.dim)
        index = faiss.IndexIVFFlat(
            self._quantizer, self.dim, self.config["cells"], faiss.METRIC_INNER_PRODUCT
        )
        index.cp.niter = self.config["iterations"]
        index.cp.max_points_per_centroid = 64
        index.train(keys)
        index.add(keys)
        return index

    def search(self, queries: FloatArray, setting: int) -> np.ndarray:
        """See Peer.search."""
        probes = min(setting, self.index.nlist)
        parameters = faiss.SearchParametersIVF(nprobe=probes)
        return np.asarray(self.index.search(queries, TOP, params=parameters)[1])


class PqFastScan(FaissPeer):
    """4-bit product quantisation scanned in registers, then exact refinement of the best; the
    setting is how many times more keys are refined than asked for."""

    name = "faiss PQ64x4fs+refine"
    quick = True
    settings = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)

    @property
    def config(self) -> dict[str, Any]:
        """See Peer.config."""
        return {"factory": "PQ64x4fs,RFlat", "train": 65_536}

    def build(self, keys: FloatArray) -> Any:
        """See Peer.build."""
        index = faiss.index_factory(self.dim, "PQ64x4fs,RFlat", faiss.METRIC_INNER_PRODUCT)
        index.train(keys[:: max(1, len(keys) // self.config["train"])])
        index.add(keys)
        return index

    def search(self, queries: FloatArray, setting: int) -> np.ndarray:
        """See Peer.search."""
        parameters = faiss.IndexRefineSearchParameters(k_factor=float(setting))
        return np.asarray(self.index.search(queries, TOP, params=parameters)[1])


BEAMS = (100, 120, 150, 200, 250, 300, 400, 500, 600, 800, 1200, 1600, 2400)


class Hnsw(FaissPeer):
    """faiss's HNSW graph; the setting is efSearch."""

    name = "faiss HNSW32"
    settings = BEAMS

    @property
    def config(self) -> dict[str, Any]:
        """See Peer.config."""
        return {"M": 32, "ef_construction": 200}

    def build(self, keys: FloatArray) -> Any:
        """See Peer.build."""
        index = faiss.IndexHNSWFlat(self.dim, self.config["M"], faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = self.config["ef_construction"]
        index.add(keys)
        return index

    def search(self, queries: FloatArray, setting: int) -> np.ndarray:
        """See Peer.search."""
        parameters = faiss.SearchParametersHNSW(efSearch=setting)
        return np.asarray(self.index.search(queries, TOP, params=parameters)[1])


class HnswLib(Peer):
    """hnswlib's HNSW graph; the setting is ef."""

    name = "hnswlib"
    settings = BEAMS

    @property
    def config(self) -> dict[str, Any]:
        """See Peer.config."""
        return {"M": 32, "ef_construction": 200}

    def build(self, keys: FloatArray) -> Any:
        """See Peer.build."""
        import hnswlib

        index = hnswlib.Index(space="ip", dim=self.dim)
        index.init_index(len(keys), M=self.config["M"], ef_construction=200, random_seed=1)
        index.add_items(keys, num_threads=1)
        return index

    def search(self, queries: FloatArray, setting: int) -> np.ndarray:
        """See Peer.search."""
        self.index.set_ef(setting)
        return np.asarray(self.index.knn_query(queries, TOP, num_threads=1)[0]).astype(np.int64)

    def write(self, path: Path) -> None:
        """See Peer.write."""
        self.index.save_index(str(path))

    def read(self, path: Path) -> Any:
        """See Peer.read."""
        import hnswlib

        index = hnswlib.Index(space="ip", dim=self.dim)
        index.load_index(str(path), max_elements=self.keys)
        return index


class Usearch(Peer):
    """usearch's HNSW graph over bfloat16 keys; the setting is expansion_search."""

    name = "usearch"
    settings = BEAMS

    @property
    def config(self) -> dict[str, Any]:
        """See Peer.config."""
        return {"connectivity": 32, "expansion_add": 200, "dtype": "bf16"}

    def _empty(self) -> Any:
        from usearch.index import Index

        return Index(ndim=self.dim, metric="ip", **self.config)

    def build(self, keys: FloatArray) -> Any:
        """See Peer.build."""
        index = self._empty()
        index.add(np.arange(len(keys)), keys, threads=1)
        return index

    def search(self, queries: FloatArray, setting: int) -> np.ndarray:
        """See Peer.search."""
        self.index.expansion_search = setting
        return np.asarray(self.index.search(queries, TOP, threads=1).keys).astype(np.int64)

    def write(self, path: Path) -> None:
        """See Peer.write."""
        self.index.save(str(path))

    def read(self, path: Path) -> Any:
        """See Peer.read."""
        index = self._empty()
        index.load(str(path))
        return index


PEERS: tuple[type[Peer], ...] = (Flat, Ivf, PqFastScan, Hnsw, HnswLib, Usearch)
