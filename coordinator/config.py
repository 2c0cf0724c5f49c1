"""Configuration of a coordinator."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.gateway.settings import GatewaySettings
from coordinator.kubernetes.settings import KubernetesSettings
from longreach.config import setting
from longreach.errors import InvalidRequest
from longreach.security.tls import TlsSettings
from longreach.telemetry import TelemetrySettings
from longreach.types import Budget

REPLICAS_MAX = 8
"""Most copies of a context; each takes its K, V and indexes, and every new token's."""


@dataclass(frozen=True)
class CoordinatorConfig(KubernetesSettings, GatewaySettings, TelemetrySettings, TlsSettings):
    """Coordinator: the public API, contexts, sessions and the decode loop."""

    listen: str = setting(
        "127.0.0.1:7300", "host:port to serve on; port 0 picks a free one and prints it."
    )
    cluster_listen: str = setting(
        "",
        "host:port for workers and nodes when TLS is on. The port above then asks clients for no "
        "certificate (API keys say who they are); empty serves all on one port, and every client "
        "shows a certificate.",
    )
    coordinator_id: str = setting(
        "",
        "Stable name of this coordinator; empty for that in its certificate, or coordinator-0. "
        "Its sessions carry it, so that those a crash left open are recognised and closed after "
        "the restart.",
    )
    data_dir: str = setting(
        "",
        "Folder of the catalog (SQLite). Empty keeps it in memory: contexts are then found "
        "again from the nodes' inventories.",
    )
    catalog: str = setting(
        "",
        "redis://HOST:PORT/DB, or rediss:// for TLS, of the catalog that several coordinators "
        "share; empty for SQLite in data_dir, for one coordinator. A password belongs into "
        "LONGREACH_CATALOG, not into a flag.",
    )
    cluster_secret: str = setting(
        "", "Secret shared by all services; signs capabilities and salts tenants."
    )
    default_budget: str = setting(
        "top_k=100+tail",
        "Keys a decode step may use when the request says nothing: exact, top_k=100, "
        "mass=0.98[64,4096] or beta=8, with +tail for the tail estimate.",
    )
    placement: str = setting("auto", "Placement policy of contexts that name none.")
    replicas: int = setting(
        2,
        "Copies of each context that names no number, on distinct nodes; fewer where there are "
        "fewer nodes or their memory does not allow it.",
    )
    repair_grace_s: float = setting(
        20.0,
        "Seconds that a node may be dead before its shards are copied to others: a restart that "
        "reads its snapshots again is quicker than a copy.",
    )
    repair_copies: int = setting(2, "Shards that are copied from node to node at the same time.")
    rebalance_pause_s: float = setting(
        10.0,
        "Seconds between two moves of a shard from the fullest node to the emptiest; negative "
        "leaves shards where they are.",
    )
    index_reserve: float = setting(
        0.25, "Room for indexes kept free beside a new context, as a share of its K and V bytes."
    )
    max_waiting: int = setting(
        64, "Generations that may wait for a worker; more are refused with RESOURCE_EXHAUSTED."
    )
    default_max_tokens: int = setting(256, "Generated tokens when the request says nothing.")
    inline_prompt_tokens: int = setting(
        1024,
        "Longest prompt fed token by token without a context; longer ones are stored as a "
        "context first, and found again by the next request with the same prompt.",
    )
    question_tokens_per_step: int = setting(
        512,
        "Question tokens in one step, all sessions together, so that long questions do not "
        "hold up sessions that are decoding.",
    )
    question_step_ms: int = setting(
        200,
        "Time that question tokens may add to a step while other sessions decode; fewer tokens "
        "are sent where they take longer.",
    )
    max_context_bytes: int = setting(256 * 2**20, "Longest text of one context, UTF-8 bytes.")
    objective_ttft_s: float = setting(
        5.0,
        "Seconds to the first token that a request should take at most; with the next one it "
        "decides which requests count as within objectives (goodput).",
    )
    objective_itl_s: float = setting(
        0.1, "Mean seconds between two tokens that a request should take at most."
    )
    trace_sample_share: float = setting(
        0.01,
        "Share of the requests that are traced where otlp_endpoint is set, 0 to 1; a request that "
        "comes with a W3C trace context (traceparent) is traced when that says so.",
    )
    drain_grace_s: float = setting(
        30.0, "Seconds that running generations may go on after SIGTERM."
    )
    failover_patience_s: float = setting(
        30.0,
        "Seconds that a generation which lost its worker or its nodes waits for others before it "
        "fails; time for a worker that restarts.",
    )
    exit_with_parent: bool = setting(False, "Exit when the parent process is gone.")

    def __post_init__(self) -> None:
        if not self.cluster_secret:
            raise InvalidRequest(
                "no cluster secret; set LONGREACH_CLUSTER_SECRET to the same random text on every "
                "service, so that nodes can check what the coordinator signs"
            )
        for name in (
            "default_max_tokens",
            "repair_copies",
            "inline_prompt_tokens",
            "question_tokens_per_step",
            "question_step_ms",
        ):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 1 <= self.replicas <= REPLICAS_MAX:
            raise InvalidRequest(f"replicas is {self.replicas}; it must be in [1, {REPLICAS_MAX}]")
        if self.repair_grace_s < 0:
            raise InvalidRequest(f"repair_grace_s is {self.repair_grace_s}; it must be 0 or more")
        if self.max_waiting < 0:
            raise InvalidRequest(f"max_waiting is {self.max_waiting}; it must be 0 or more")
        if self.failover_patience_s < 0:
            raise InvalidRequest(
                f"failover_patience_s is {self.failover_patience_s}; it must be 0 or more"
            )
        if not 0 <= self.trace_sample_share <= 1:
            raise InvalidRequest(
                f"trace_sample_share is {self.trace_sample_share}; it must be in [0, 1]"
            )
        for name in ("objective_ttft_s", "objective_itl_s"):
            if getattr(self, name) <= 0:
                raise InvalidRequest(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.index_reserve < 0:
            raise InvalidRequest(f"index_reserve is {self.index_reserve}; it must be 0 or more")
        self.budget()
        self.check_kubernetes()

    @property
    def name(self) -> str:
        """The coordinator's stable name, with the default resolved."""
        return self.coordinator_id or "coordinator-0"

    def budget(self) -> Budget:
        """The default budget, parsed; raises InvalidRequest when it is not one."""
        try:
            return Budget.parse(self.default_budget)
        except ValueError as problem:
            raise InvalidRequest(f"default_budget: {problem}") from None
