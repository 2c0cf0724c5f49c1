"""A whole plan: what is asked, and everything that follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field

from longreach.errors import InvalidRequest
from longreach.planning.accelerators import Accelerator
from longreach.planning.decode import DecodeEstimate, estimate_decode
from longreach.planning.machine import MachineProfile
from longreach.planning.memory import (
    DeviceBytes,
    NodeBytes,
    Resident,
    StepBytes,
    device_bytes,
    node_bytes,
    step_bytes,
)
from longreach.planning.nodes import NodePlan, plan_nodes
from longreach.planning.prefill import PrefillEstimate, estimate_prefill
from longreach.planning.shapes import ModelShape
from longreach.planning.table1 import Table1Column, table1
from longreach.types import Budget

DEVICE_MEMORY_SHARE = 0.9
"""Share of a device's memory to plan with; the rest is the allocator's and the driver's."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of a deployment.

    `concurrency` sessions at a time, each over one of `contexts` stored contexts of `context`
    tokens, with tails (question and answer) of up to `tail_tokens`. `nodes` or `node_memory_bytes`
    is 0 where it is to be found; `replicas` copies of everything are kept on them.
    `sparse_density` is the share of visible pairs that a sparse prefill computes.
    """

    shape: ModelShape
    context: int
    concurrency: int
    contexts: int
    accelerator: Accelerator
    budget: Budget
    tail_tokens: int = 2048
    replicas: int = 2
    node_cores: int = 16
    nodes: int = 0
    node_memory_bytes: int = 0
    ttft_target_s: float = 0.0
    sparse_density: float = 0.1
    resident: Resident = field(default_factory=Resident)

    def __post_init__(self) -> None:
        for name in ("context", "concurrency", "contexts", "replicas"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.sparse_density <= 1:
            raise InvalidRequest(
                f"sparse density is {self.sparse_density}; it is a share, above 0 and at most 1"
            )


@dataclass(frozen=True, slots=True)
class Plan:
    """What a workload takes. Bytes and seconds; see the parts."""

    workload: Workload
    workers: int
    device: DeviceBytes
    device_fits: bool
    node: NodeBytes
    nodes: NodePlan
    step: StepBytes
    dense: PrefillEstimate
    sparse: PrefillEstimate
    decode: DecodeEstimate
    table1: tuple[Table1Column, ...]

    @property
    def disk_bytes(self) -> int:
        """Snapshots of all sealed shards with their indexes, over all nodes."""
        return self.node.contexts + self.node.indexes


def make_plan(workload: Workload, profile: MachineProfile | None = None) -> Plan:
    """The plan of a workload, on nodes like the measured one where there is a profile.

    Raises InvalidRequest when nothing of that kind can be built.
    """
    shape, context = workload.shape, workload.context
    workers = -(-workload.concurrency // workload.resident.max_sessions)
    # Sessions spread over the workers; a worker needs no more slots than it can get sessions.
    slots = min(workload.resident.max_sessions, workload.concurrency)
    resident = Resident(
        workload.resident.sink_tokens,
        workload.resident.window_tokens,
        workload.resident.max_row_tokens,
        slots,
    )
    device = device_bytes(shape, context, slots, resident)
    stored = (context, workload.contexts, workload.concurrency, workload.tail_tokens)
    nodes = plan_nodes(
        shape,
        node_bytes(shape, *stored),
        workload.node_cores,
        workload.nodes,
        workload.node_memory_bytes,
        workload.replicas,
    )
    accelerator, target = workload.accelerator, workload.ttft_target_s
    return Plan(
        workload=workload,
        workers=workers,
        device=device,
        device_fits=device.total <= DEVICE_MEMORY_SHARE * accelerator.memory_bytes,
        node=node_bytes(shape, *stored, copies=nodes.copies),
        nodes=nodes,
        step=step_bytes(shape),
        dense=estimate_prefill(shape, context, accelerator, 1.0, target),
        sparse=estimate_prefill(shape, context, accelerator, workload.sparse_density, target),
        decode=estimate_decode(shape, context, slots, nodes, accelerator, workload.budget, profile),
        table1=table1(shape, accelerator),
    )
