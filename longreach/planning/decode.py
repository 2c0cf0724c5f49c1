"""Expected time of a decoded token: the model's pass, and for each searched layer one exchange.

Both are bound by memory: the device reads the weights once a step, a node reads the codes of all
keys and the rows of a few. Layers follow each other, so their times add up. The nodes of a layer
work side by side; the worker attends its resident set meanwhile, which is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from longreach.planning.accelerators import Accelerator
from longreach.planning.machine import MachineProfile
from longreach.planning.memory import CODE_BYTES
from longreach.planning.nodes import NodePlan
from longreach.planning.quantities import Input
from longreach.planning.shapes import ModelShape
from longreach.types import Budget

EXACT_BELOW = 16_384
"""Shards of fewer keys are attended whole (retrieval_node/index/auto.py)."""

MEMORY_BYTES_S = 100e9
ROUND_TRIP_S = 500e-6
READ_IN_FULL = 0.03
DEVICE_SHARE = 0.7


@dataclass(frozen=True, slots=True)
class DecodeEstimate:
    """Seconds of one step in which each session gets a token: `model_s` on the device,
    `round_trips_s` on the network, `search_s` in the nodes' memory."""

    model_s: float
    round_trips_s: float
    search_s: float
    inputs: tuple[Input, ...]

    @property
    def token_s(self) -> float:
        """Seconds per token of one session."""
        return self.model_s + self.round_trips_s + self.search_s


def estimate_decode(
    shape: ModelShape,
    context: int,
    sessions: int,
    nodes: NodePlan,
    accelerator: Accelerator,
    budget: Budget,
    profile: MachineProfile | None = None,
) -> DecodeEstimate:
    """Time of a decode step of `sessions` sessions, each over `context` tokens."""
    memory, round_trip = _node_inputs(profile)
    device = Input(
        "share of the device's memory bandwidth", DEVICE_SHARE, "", "assumed", "weights, per step"
    )
    read = _read_in_full(context, budget)
    coded = 0 if read.value == 1 else CODE_BYTES
    searched_bytes = sum(
        layer.kv_heads * (coded + read.value * (layer.head_dim + layer.value_dim) * shape.itemsize)
        for layer in shape.searched
    )
    # With whole layers on a node one node answers at a time; head groups share a layer's reading.
    side_by_side = nodes.messages
    return DecodeEstimate(
        model_s=shape.weight_bytes / (accelerator.memory_bytes_s * device.value),
        round_trips_s=len(shape.searched) * round_trip.value,
        search_s=sessions * context * searched_bytes / side_by_side / memory.value,
        inputs=(memory, round_trip, read, device),
    )


def _node_inputs(profile: MachineProfile | None) -> tuple[Input, Input]:
    if profile is None:
        way = "measure a node with `longreach plan --measure`"
        return (
            Input("node memory bandwidth", MEMORY_BYTES_S, "bytes/s", "assumed", way),
            Input("round trip of a layer", ROUND_TRIP_S, "s", "assumed", way),
        )
    where = f"{profile.cpu}, {profile.cores} cores, {profile.measured_at}"
    return (
        Input("node memory bandwidth", profile.memory_bytes_s, "bytes/s", "measured", where),
        Input("round trip of a layer", profile.round_trip_s, "s", "measured", "loopback, no wire"),
    )


def _read_in_full(context: int, budget: Budget) -> Input:
    name = "share of keys read in full"
    if budget.exact:
        return Input(name, 1.0, "", "given", "budget exact")
    if context < EXACT_BELOW:
        return Input(name, 1.0, "", "published", f"below {EXACT_BELOW} tokens no index is built")
    return Input(
        name, READ_IN_FULL, "", "published", "RetrievalAttention traverses 1-3% of the keys"
    )
