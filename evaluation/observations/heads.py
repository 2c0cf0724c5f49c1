"""The heads that are measured: synthetic ones, or those of a dump."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.synthetic import workload
from evaluation.observations.dump_files import Dump, DumpedLayer, read_dump
from longreach.errors import InvalidRequest
from longreach.types import FloatArray, IntArray, StorageArray

SYNTHETIC = {
    "synthetic:structured": "structured",
    "synthetic:flat": "hard",
    "synthetic:ood": "ood",
}
"""Sources by name, and what benchmarks/synthetic.py calls their key spectrum."""

PREFILL_SHARE = 16
"""One in how many positions of a synthetic context has its queries sampled."""


@dataclass(frozen=True, slots=True)
class HeadGroup:
    """One KV head over a context of n tokens, and the query heads that share it.

    keys [n, d] and values [n, dv], storage dtype; prefill_queries [group, m, d] fp32 with their
    positions [m], ascending; decode_queries [group, steps, d] fp32 of consecutive tokens after the
    context. logits = scale * q·k, softcapped when `softcap` > 0.
    """

    layer: int
    kv_head: int
    keys: StorageArray
    values: StorageArray
    prefill_queries: FloatArray
    prefill_positions: IntArray
    decode_queries: FloatArray
    scale: float
    softcap: float = 0.0

    @property
    def q_heads(self) -> range:
        """Numbers of the query heads within the layer."""
        group = len(self.decode_queries)
        return range(self.kv_head * group, (self.kv_head + 1) * group)


@dataclass(frozen=True)
class Source:
    """Where heads come from: a synthetic kind of n keys, or a dump with the layers and KV heads
    chosen of it (none: all)."""

    name: str
    n: int
    seed: int
    steps: int
    directory: Path | None = None
    layers: tuple[int, ...] = ()
    kv_heads: tuple[int, ...] = ()

    @cached_property
    def dump(self) -> Dump | None:
        """The dump, if that is the source."""
        return None if self.directory is None else read_dump(self.directory)

    @property
    def config(self) -> dict[str, Any]:
        """What was measured, for the report."""
        if self.dump is None:
            return {"source": self.name, "n": self.n, "seed": self.seed, "steps": self.steps}
        named = ("model", "tokens", "decode_tokens", "text", "token_digest", "dtype", "rope")
        return {"source": "dump", **{name: self.dump.header[name] for name in named}}

    @property
    def size(self) -> int:
        """How many heads `heads` gives."""
        return 1 if self.dump is None else len(self._chosen(self.dump))

    def heads(self) -> Iterator[HeadGroup]:
        """The heads, one in memory at a time."""
        if self.dump is None:
            yield synthetic_head(self.name, self.n, seed=self.seed, steps=self.steps)
            return
        for layer, head in self._chosen(self.dump):
            yield dumped_head(self.dump, layer, head)

    def _chosen(self, dump: Dump) -> list[tuple[DumpedLayer, int]]:
        found = [
            (layer, head)
            for layer in dump.layers
            for head in range(layer.kv_heads)
            if not self.layers or layer.layer in self.layers
            if not self.kv_heads or head in self.kv_heads
        ]
        if not found:
            raise InvalidRequest(
                f"no head of {dump.directory} is in layers {self.layers or 'any'} and KV heads "
                f"{self.kv_heads or 'any'}; it has layers {[x.layer for x in dump.layers]} with "
                f"{dump.layers[0].kv_heads if dump.layers else 0} KV heads"
            )
        return found


def synthetic_head(
    name: str, n: int, *, seed: int = 0, steps: int = 64, head_dim: int = 128
) -> HeadGroup:
    """A KV head of a synthetic source with a group of four query heads."""
    made = workload(
        n,
        name=SYNTHETIC[name],
        head_dim=head_dim,
        steps=steps,
        prefill=n // PREFILL_SHARE,
        seed=seed,
    )
    return HeadGroup(
        0,
        0,
        made.keys,
        made.values,
        made.prefill_queries,
        made.prefill_positions,
        made.decode_queries,
        made.scale,
    )


def dumped_head(dump: Dump, layer: DumpedLayer, kv_head: int) -> HeadGroup:
    """A KV head of a dump; its context is what comes before the decode queries."""
    from safetensors import safe_open

    from gpu_worker.arrays import to_array

    group = layer.q_heads // layer.kv_heads
    queries = slice(kv_head * group, (kv_head + 1) * group)
    with safe_open(dump.directory / layer.file, framework="pt") as file:

        def rows(name: str, heads: slice) -> StorageArray:
            return to_array(file.get_slice(name)[heads])

        here = slice(kv_head, kv_head + 1)
        return HeadGroup(
            layer.layer,
            kv_head,
            rows("keys", here)[0, : dump.context],
            rows("values", here)[0, : dump.context],
            np.asarray(rows("queries", queries), np.float32),
            to_array(file.get_tensor("positions")).astype(np.int64),
            np.asarray(rows("decode_queries", queries), np.float32),
            layer.scale,
            layer.softcap,
        )


def add_source_flags(parser: argparse.ArgumentParser, n: int) -> None:
    """The flags that choose the heads, and --out."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--source",
        choices=tuple(SYNTHETIC),
        default="synthetic:structured",
        help="synthetic keys with a decaying or a flat spectrum, or with queries that point where "
        "keys hardly vary (default synthetic:structured)",
    )
    source.add_argument("--dump", type=Path, metavar="DIR", help="heads of a model, from `dump`")
    parser.add_argument(
        "--n", type=int, default=n, metavar="KEYS", help=f"keys of a synthetic source (default {n})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of a synthetic source (default 0)")
    parser.add_argument(
        "--steps", type=int, default=64, help="decode steps of a synthetic source (default 64)"
    )
    parser.add_argument("--layers", type=int, nargs="+", default=(), help="of a dump (default all)")
    parser.add_argument(
        "--kv-heads", type=int, nargs="+", default=(), help="of each layer of a dump (default all)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")


def source_of(given: argparse.Namespace) -> Source:
    """The source that the flags name."""
    if given.n < 1024:
        raise InvalidRequest(f"--n {given.n} keys; a synthetic source needs at least 1024")
    return Source(
        given.source,
        given.n,
        given.seed,
        given.steps,
        given.dump,
        tuple(given.layers),
        tuple(given.kv_heads),
    )
