"""What the coordinator and a GPU worker say to each other: prefill progress and decode steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from longreach.errors import LongreachError
from longreach.types import Identity, LayerGeometry, WorkFigures


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model a worker serves. `source` is the path or hub name it was loaded from; `eos_ids`
    end a generation; `identity.tenant` is empty."""

    model: str
    revision: str
    identity: Identity
    layers: tuple[LayerGeometry, ...]
    max_positions: int
    vocab_size: int
    source: str
    eos_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a worker is and what it holds."""

    model: ModelInfo
    device: str
    max_sessions: int
    sessions: int
    max_row_tokens: int
    sink_tokens: int
    window_tokens: int
    resident_capacity_bytes: int
    resident_used_bytes: int
    rss_bytes: int


@dataclass(frozen=True, slots=True)
class PrefillSummary:
    """What a prefill did; `peak_device_bytes` is 0 where the device keeps no statistics."""

    compute_s: float
    total_s: float
    offloaded_bytes: int
    peak_device_bytes: int
    checksums: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """Where a prefill stands; `summary` comes with the last one, when every shard is sealed."""

    layers_done: int
    layers_total: int
    tokens_done: int
    tokens_total: int
    fraction: float
    summary: PrefillSummary | None = None


@dataclass(frozen=True, slots=True)
class StepRow:
    """Tokens of one session to feed in a step, from `position` on; `sample` draws one after."""

    session_id: str
    position: int
    token_ids: tuple[int, ...]
    sample: bool
    top_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class StepRowResult:
    """What became of a StepRow. With `error` set the session stands where it was.

    `hedged_requests`: requests with this row that a second node got because the first was late.
    `lagging_node_ids`: nodes that miss some of the session's tail until it is opened again.
    """

    session_id: str
    token_id: int | None = None
    logprob: float = 0.0
    top_logprobs: tuple[tuple[int, float], ...] = ()
    work: WorkFigures = field(default_factory=WorkFigures)
    coverage: float = 1.0
    acknowledged_stop: int = 0
    error: LongreachError | None = None
    hedged_requests: int = 0
    lagging_node_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepTiming:
    """Where a step's time went on the worker, seconds. `node_s`: slowest node of each layer."""

    queue_s: float = 0.0
    total_s: float = 0.0
    send_s: float = 0.0
    local_s: float = 0.0
    wait_s: float = 0.0
    merge_s: float = 0.0
    node_s: float = 0.0
    sample_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """Reply to one step: results in the order of the rows."""

    results: tuple[StepRowResult, ...]
    timing: StepTiming
