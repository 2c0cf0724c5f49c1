"""Configuration of a GPU worker."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from longreach.config import setting
from longreach.errors import InvalidRequest
from longreach.security.tls import TlsSettings
from longreach.telemetry import TelemetrySettings
from longreach.types import STORAGE_DTYPES


@dataclass(frozen=True)
class WorkerConfig(TelemetrySettings, TlsSettings):
    """A GPU worker: runs the model with a small resident KV window; the rest lives on nodes."""

    listen: str = setting("127.0.0.1:0", "host:port to answer on; port 0 picks a free one")
    advertise: str = setting(
        "", "host:port others reach this worker at; empty for the listen address"
    )
    worker_id: str = setting("", "stable name of the worker; empty for host name and port")
    model: str = setting("", "directory or hub name of the model")
    device: str = setting("auto", "torch device; auto takes cuda where there is one")
    dtype: str = setting("auto", "float32, float16 or bfloat16; auto takes the model's own")
    sink_tokens: int = setting(128, "first tokens kept resident")
    window_tokens: int = setting(512, "most recent tokens kept resident")
    max_sessions: int = setting(16, "sessions that fit; their resident KV is allocated at start")
    max_row_tokens: int = setting(512, "longest run of tokens one session may feed in a step")
    prefill_chunk_tokens: int = setting(
        2048, "largest prefill chunk; chunks are made smaller to take the time below"
    )
    prefill_chunk_ms: int = setting(
        500, "how long a prefill chunk may hold the device while no session decodes"
    )
    prefill_shared_chunk_ms: int = setting(
        50, "how long a prefill chunk may hold the device while sessions decode"
    )
    prefill_pattern: str = setting(
        "adaptive",
        "attention of prefills: adaptive (sparse; dense on short prompts), dense, a_shape,\n"
        "dilated, strided, block_sparse, vertical_slash or the slow reference top_k, with\n"
        "parameters as in vertical_slash:verticals=500,slashes=1500; minference takes the pattern\n"
        "of each head from minference:file=PATH, or from the model's own patterns.json; part of\n"
        "a context's identity",
    )
    step_deadline_ms: int = setting(30_000, "longest wait for retrieval nodes in one step")
    append_timeout_ms: int = setting(
        5_000, "longest wait for nodes to acknowledge tokens that leave the window"
    )
    session_timeout_s: int = setting(
        900, "a session without a step for this long gives its slot up when slots run out"
    )
    threads: int = setting(0, "CPU threads of torch; 0 for torch's own choice")
    coordinators: str = setting("", "host:port of the coordinators, comma separated")
    cluster_secret: str = setting("", "secret shared by the cluster's services")
    host: str = setting("", "physical host; empty for the host name")
    zone: str = setting("", "zone; may be empty")
    exit_with_parent: bool = setting(False, "stop when the parent process is gone")

    def __post_init__(self) -> None:
        at_least = {
            "sink_tokens": 0,
            "window_tokens": 1,
            "max_sessions": 1,
            "max_row_tokens": 1,
            "prefill_chunk_tokens": 128,
            "prefill_chunk_ms": 1,
            "prefill_shared_chunk_ms": 1,
            "step_deadline_ms": 1,
            "append_timeout_ms": 1,
            "session_timeout_s": 0,
            "threads": 0,
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise InvalidRequest(
                    f"{name} is {getattr(self, name)}; it must be at least {least}"
                )
        dtypes = ("auto", *(kind.name for kind in STORAGE_DTYPES))
        if self.dtype not in dtypes:
            raise InvalidRequest(f"dtype is {self.dtype!r}; known: {', '.join(dtypes)}")

    @property
    def coordinator_addresses(self) -> tuple[str, ...]:
        """Addresses of the coordinators."""
        return tuple(part.strip() for part in self.coordinators.split(",") if part.strip())

    def member_id(self, address: str) -> str:
        """The worker's name, with the default resolved; `address` is where it listens."""
        return self.worker_id or f"{self.host_name}:{address.rpartition(':')[2]}"

    @property
    def host_name(self) -> str:
        """Physical host."""
        return self.host or socket.gethostname()
