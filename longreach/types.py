"""The words of longreach as immutable values (see the glossary in docs/architecture.md).

Arrays are NumPy; 16-bit floats are ``numpy.float16`` and ``ml_dtypes.bfloat16``. Positions count
tokens from 0; a span is half open. Nothing here knows about gRPC, torch or a service.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
# Storage arrays hold K and V in the model's dtype: float32, float16 or bfloat16.
StorageArray = npt.NDArray[np.generic]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
STORAGE_DTYPES: tuple[np.dtype[np.generic], ...] = (
    np.dtype(np.float32),
    np.dtype(np.float16),
    BFLOAT16,
)

BOUNDARY_TOKENS = 64
"""Resident and offloaded positions meet at multiples of this many tokens."""


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Positions [start, stop)."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.stop < self.start:
            raise ValueError(f"not a span: [{self.start}, {self.stop})")

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, position: int) -> bool:
        return self.start <= position < self.stop

    def intersect(self, other: Span) -> Span:
        """Positions in both; empty spans start where the later one starts."""
        start = max(self.start, other.start)
        return Span(start, max(start, min(self.stop, other.stop)))

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop})"


def retrieval_boundary(tokens: int, window: int) -> int:
    """Where the window begins when `tokens` have been seen: floor64(tokens - window), at least 0.

    Nodes serve [sink, boundary); the worker holds [0, sink) and [boundary, tokens), so the window
    varies by up to 63 tokens.
    """
    return max(0, (tokens - window) // BOUNDARY_TOKENS * BOUNDARY_TOKENS)


def retrieval_scope(tokens: int, sink: int, window: int) -> Span:
    """Positions that nodes serve when `tokens` have been seen; may be empty."""
    return Span(sink, max(sink, retrieval_boundary(tokens, window)))


@dataclass(frozen=True, slots=True)
class Identity:
    """What KV belongs to. Two KV caches may be mixed only if their identities are equal."""

    model: str
    revision: str
    dtype: str
    rope_regime: str = "default"
    prefill: str = "dense"
    tenant: str = ""

    def difference(self, other: Identity) -> str:
        """The fields that differ, for an error message; empty when equal."""
        return ", ".join(
            f"{f.name} {getattr(self, f.name)!r} != {getattr(other, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        )


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """Shape of one decoder layer's attention. `sliding_window` is 0 for full attention."""

    layer: int
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    sliding_window: int = 0

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.q_heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class Shard:
    """A rectangle of a context's KV: positions x layers x KV heads, with the nodes that hold it."""

    shard_id: str
    span: Span
    layers: tuple[int, ...]
    kv_head_start: int
    kv_head_stop: int
    node_ids: tuple[str, ...]

    @property
    def kv_heads(self) -> int:
        """Number of KV heads held."""
        return self.kv_head_stop - self.kv_head_start


@dataclass(frozen=True, slots=True)
class ShardMap:
    """Where every position, layer and KV head of a context lives.

    `addresses`: node id → host:port. `epoch` grows with every change of the map: what was decided
    on an older one is refused.
    """

    shards: tuple[Shard, ...]
    addresses: dict[str, str]
    policy: str
    reason: str = ""
    epoch: int = 1


@dataclass(frozen=True, slots=True)
class KvBlock:
    """K and V of a run of positions for layers of equal shape.

    keys [layers, kv_heads, positions, head_dim], values [layers, kv_heads, positions, value_dim],
    both in the storage dtype, keys after rope.
    """

    layers: tuple[int, ...]
    kv_head_start: int
    start: int
    keys: StorageArray
    values: StorageArray

    @property
    def span(self) -> Span:
        """Positions held."""
        return Span(self.start, self.start + self.keys.shape[2])


@dataclass(frozen=True, slots=True)
class QuerySample:
    """Prefill queries of one layer: positions [n], queries [q_heads, n, head_dim] after rope."""

    layer: int
    kv_head_start: int
    positions: IntArray
    queries: StorageArray


@dataclass(frozen=True, slots=True)
class Budget:
    """How many keys a query head may use: exactly one of the four rules.

    top_k: the k highest logits. mass: a share of the attention mass, with `floor` and `ceiling`
    keys (0: no ceiling). beta: logits z >= z_max - beta (natural log units). exact: every key.
    `tail_estimate` lets an index estimate the keys outside the budget where it can.
    """

    top_k: int | None = None
    mass: float | None = None
    floor: int = 0
    ceiling: int = 0
    beta: float | None = None
    exact: bool = False
    tail_estimate: bool = False

    def __post_init__(self) -> None:
        rules = [self.top_k is not None, self.mass is not None, self.beta is not None, self.exact]
        if sum(rules) != 1:
            raise ValueError("a budget has exactly one of top_k, mass, beta and exact")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        if self.mass is not None and not 0 < self.mass <= 1:
            raise ValueError(f"mass is {self.mass}; it must be in (0, 1]")
        if self.beta is not None and not self.beta >= 0:
            raise ValueError(f"beta is {self.beta}; it must be 0 or more")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """The budget that `str` wrote: "exact", "top_k=100", "mass=0.98[64,4096]", "beta=8"."""
        match = re.fullmatch(
            r"(?:(exact)|(top_k|mass|beta)=([0-9.]+)(?:\[(\d+),(\d+)\])?)(\+tail)?", text.strip()
        )
        if match is None:
            raise ValueError(
                f"{text!r} is not a budget; write exact, top_k=100, mass=0.98, mass=0.98[64,4096] "
                "or beta=8, with +tail for the tail estimate"
            )
        exact, rule, number, floor, ceiling, tail = match.groups()
        if exact:
            return cls(exact=True, tail_estimate=bool(tail))
        return cls(
            top_k=int(number) if rule == "top_k" else None,
            mass=float(number) if rule == "mass" else None,
            beta=float(number) if rule == "beta" else None,
            floor=int(floor or 0),
            ceiling=int(ceiling or 0),
            tail_estimate=bool(tail),
        )

    def __str__(self) -> str:
        tail = "+tail" if self.tail_estimate else ""
        if self.exact:
            return f"exact{tail}"
        if self.top_k is not None:
            return f"top_k={self.top_k}{tail}"
        if self.mass is not None:
            return f"mass={self.mass:g}[{self.floor},{self.ceiling}]{tail}"
        return f"beta={self.beta:g}{tail}"


@dataclass(frozen=True, slots=True)
class WorkFigures:
    """Work done by retrieval, as counts over (KV head, position) pairs, summed over query rows.

    The four ratios are always reported together, never one alone.
    """

    keys_in_scope: int = 0
    keys_scanned: int = 0
    keys_sketched: int = 0
    keys_attended: int = 0
    bytes_read: int = 0
    bytes_in_scope: int = 0
    keys_covered: int = 0

    def __add__(self, other: WorkFigures) -> WorkFigures:
        # Written out: this runs for every session of every layer.
        return WorkFigures(
            self.keys_in_scope + other.keys_in_scope,
            self.keys_scanned + other.keys_scanned,
            self.keys_sketched + other.keys_sketched,
            self.keys_attended + other.keys_attended,
            self.bytes_read + other.bytes_read,
            self.bytes_in_scope + other.bytes_in_scope,
            self.keys_covered + other.keys_covered,
        )

    @property
    def scan_fraction(self) -> float:
        """Keys whose full-precision row was read / keys in scope."""
        return self.keys_scanned / max(1, self.keys_in_scope)

    @property
    def sketch_fraction(self) -> float:
        """Keys scored by a code / keys in scope."""
        return self.keys_sketched / max(1, self.keys_in_scope)

    @property
    def attended_fraction(self) -> float:
        """Keys in the softmax / keys in scope."""
        return self.keys_attended / max(1, self.keys_in_scope)

    @property
    def bytes_fraction(self) -> float:
        """Bytes read / K+V bytes in scope."""
        return self.bytes_read / max(1, self.bytes_in_scope)

    @property
    def coverage(self) -> float:
        """Share of the keys in scope whose shard answered; 1 for an empty scope."""
        return self.keys_covered / self.keys_in_scope if self.keys_in_scope else 1.0


@dataclass(frozen=True, slots=True)
class PartialAttention:
    """Softmax attention over some of the keys: output [..., value_dim] and lse [...], fp32.

    `lse` is the natural-log sum of exponentials, -inf where no key was seen (output 0 there).
    """

    output: FloatArray
    lse: FloatArray


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn: temperature 0 is greedy; top_p and top_k of 0 are off."""

    temperature: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """Everything needed to resume a session on any coordinator and any worker.

    `generated_ids` follow `prompt_ids`: what was generated before it was taken over.
    `coordinator_id` is who drives it.
    """

    session_id: str
    context_id: str
    context_stop: int
    tenant: str
    epoch: int
    prompt_ids: tuple[int, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()
    max_tokens: int = 0
    generated_ids: tuple[int, ...] = ()
    coordinator_id: str = ""

    @property
    def known_ids(self) -> tuple[int, ...]:
        """Token ids from `context_stop` on, as far as they are known."""
        return self.prompt_ids + self.generated_ids


@dataclass(frozen=True, slots=True)
class AttendRows:
    """Rows of one session: queries [rows, q_heads, head_dim] of KV heads [start, stop).

    `logit_floor` [rows, q_heads]: absolute logits below which keys need not be used.
    """

    handle: int
    kv_head_start: int
    kv_head_stop: int
    scope: Span
    budget: Budget
    queries: StorageArray
    logit_floor: FloatArray | None = None


@dataclass(frozen=True, slots=True)
class AttendResult:
    """Answer to AttendRows: output [rows, q_heads, value_dim], lse [rows, q_heads].

    `search_s` and `attend_s` are the times spent choosing keys and attending them; kinds that
    fuse the two report all of it as `attend_s`.
    """

    partial: PartialAttention
    work: WorkFigures
    index_kind: str = ""
    search_s: float = 0.0
    attend_s: float = 0.0


@dataclass(frozen=True, slots=True)
class AppendEntry:
    """New KV of one session at [start, start + len(token_ids)), all the node's layers."""

    handle: int
    epoch: int
    start: int
    token_ids: tuple[int, ...]
    blocks: tuple[KvBlock, ...]


@dataclass(frozen=True, slots=True)
class IndexStatus:
    """State of the index over a shard; `built` and `total` count KV heads of all its layers."""

    serving_kind: str
    target_kind: str
    built: int
    total: int
    bytes: int
    build_cpu_s: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True)
class SessionInventory:
    """An open session on a node: who drives it, and under which epoch."""

    session_id: str
    coordinator_id: str = ""
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class ShardInventory:
    """A shard on a node, as the node knows it."""

    context_id: str
    shard: Shard
    identity: Identity
    sealed: bool
    checksum: int
    bytes_stored: int
    index: IndexStatus
    snapshotted: bool


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What a shard that is copied is; it comes first."""

    context_id: str
    shard: Shard
    identity: Identity
    geometry: tuple[LayerGeometry, ...]


@dataclass(frozen=True, slots=True)
class ShardEnd:
    """What seals a shard that is copied; it comes last. `token_ids` int32 [span]; `checksum` is the
    CRC-32 at the seal."""

    token_ids: npt.NDArray[np.int32]
    checksum: int


ShardPart = ShardHeader | KvBlock | QuerySample | ShardEnd


@dataclass(frozen=True, slots=True)
class CopyProgress:
    """How far a copy is, in bytes of K and V; `sealed` once it serves, with its CRC-32."""

    bytes_copied: int
    bytes_total: int
    sealed: bool = False
    checksum: int = 0


@dataclass(frozen=True, slots=True)
class NodeStats:
    """Memory and counters of a node, bytes."""

    memory_limit_bytes: int
    context_bytes: int
    index_bytes: int
    tail_bytes: int
    rss_bytes: int
    sessions: int
    attend_requests: int
    work: WorkFigures
    isa: str

    @property
    def used_bytes(self) -> int:
        """Bytes that K and V, indexes and tails take together."""
        return self.context_bytes + self.index_bytes + self.tail_bytes


def storage_dtype(name: str) -> np.dtype[np.generic]:
    """NumPy dtype of a storage dtype's name: "float32", "float16" or "bfloat16"."""
    for dtype in STORAGE_DTYPES:
        if dtype.name == name:
            return dtype
    raise ValueError(
        f"unknown storage dtype {name!r}; known: {', '.join(d.name for d in STORAGE_DTYPES)}"
    )


def total_work(figures: Sequence[WorkFigures]) -> WorkFigures:
    """Sum of several work figures."""
    total = WorkFigures()
    for each in figures:
        total = total + each
    return total
