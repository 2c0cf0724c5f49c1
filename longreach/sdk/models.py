"""What the SDK returns: immutable values, times in seconds, sizes in bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

from longreach.types import ShardMap
from longreach.types import WorkFigures as Work

__all__ = [
    "Context",
    "Generation",
    "Member",
    "ShardMap",
    "Status",
    "Timing",
    "Token",
    "Usage",
    "Work",
]


@dataclass(frozen=True, slots=True)
class Context:
    """A stored token sequence that questions can be asked about.

    `state`: "reserved", "filling", "ready", "unavailable", "repairing" (its lost KV is computed
    again) or "failed" (then `error` says why).
    `kv_bytes`: K and V on the nodes, one copy. `prefill_fraction` and `index_fraction` in [0, 1];
    a ready context answers by exact search while its index builds. `index_kind`: what answers now.
    `index_error`: why the index, or a part of it, could not be built; what answers now goes on.
    `replicas`: copies of each shard that are wanted; `shards_under_replicated` have fewer.
    `found`: `contexts.create` found it stored instead of computing it.
    """

    id: str
    name: str
    model: str
    state: str
    tokens: int
    kv_bytes: int
    prefill_fraction: float
    index_fraction: float
    index_kind: str
    index_bytes: int
    created_at: float
    prefill_s: float
    shard_map: ShardMap
    error: str = ""
    index_error: str = ""
    replicas: int = 1
    shards_under_replicated: int = 0
    found: bool = False

    @property
    def ready(self) -> bool:
        """Whether it answers questions."""
        return self.state == "ready"

    @property
    def indexed(self) -> bool:
        """Whether its index is complete."""
        return self.ready and self.index_fraction >= 1.0


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token: the text it adds (empty while a character is incomplete) and its natural
    log-probability. `alternatives`: the likeliest (token id, log-probability), if asked for."""

    id: int
    text: str
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a generation."""

    context_tokens: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of a generation went, as the server measured it.

    `first_token_s` runs from the request's arrival; `per_token_s` is the mean between later
    tokens. `send_s` to `merge_s` and `sample_s` are sums over the worker's steps, `node_s` the
    slowest node of each layer.
    """

    queue_s: float = 0.0
    open_s: float = 0.0
    first_token_s: float = 0.0
    per_token_s: float = 0.0
    send_s: float = 0.0
    local_s: float = 0.0
    wait_s: float = 0.0
    merge_s: float = 0.0
    node_s: float = 0.0
    sample_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished generation.

    `finish_reason`: "stop" (end of sequence or a stop text) or "length". `work` is what the nodes
    did for decode steps, `prompt_work` for the question's rows. `coverage`: lowest share of the
    context that answered in any step. `resident_kv_bytes` is the KV the worker held,
    `full_kv_bytes` what it would have held without the nodes. `failovers`: times it moved to
    another worker or was opened anew on its nodes; `recomputed_tokens` were fed again for it.
    `resumed`: times it went on at another coordinator. `hedged_requests`: requests that a second
    node got because the first was late.
    """

    request_id: str
    text: str
    tokens: tuple[Token, ...]
    finish_reason: str
    usage: Usage
    timing: Timing
    work: Work
    prompt_work: Work
    coverage: float
    resident_kv_bytes: int
    full_kv_bytes: int
    worker_id: str
    index_kinds: tuple[str, ...] = ()
    failovers: int = 0
    recomputed_tokens: int = 0
    hedged_requests: int = 0
    resumed: int = 0


@dataclass(frozen=True, slots=True)
class Member:
    """A worker or node: `kind` "worker" or "node"; `state` "alive", "suspect", "dead" or "leaving";
    `age_s` since its last report; `detail`: a worker's model, a node's instruction set."""

    id: str
    kind: str
    address: str
    state: str
    age_s: float
    used_bytes: int
    limit_bytes: int
    sessions: int
    detail: str


@dataclass(frozen=True, slots=True)
class Status:
    """The cluster as its coordinator sees it. `segments_under_replicated`: shards, of all contexts,
    of which fewer copies are within reach than are wanted. `reprefill_tokens`: positions computed
    again because no copy was left."""

    members: tuple[Member, ...]
    epoch: int
    contexts: int
    running: int
    waiting: int
    models: tuple[str, ...] = field(default=())
    version: str = ""
    segments_under_replicated: int = 0
    reprefill_tokens: int = 0
