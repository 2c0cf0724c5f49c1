"""What nodes and workers report about themselves."""

from __future__ import annotations

from longreach.steps import ModelInfo, WorkerStatus
from longreach.types import IndexStatus, NodeStats, SessionInventory, ShardInventory
from longreach.v1 import retrieval_pb2, worker_pb2
from longreach.wire.placement import (
    geometry_from_proto,
    geometry_to_proto,
    identity_from_proto,
    identity_to_proto,
    shard_from_proto,
    shard_to_proto,
)
from longreach.wire.session import work_from_proto, work_to_proto


def index_status_to_proto(status: IndexStatus) -> retrieval_pb2.IndexStatus:
    """State of the index over a shard."""
    return retrieval_pb2.IndexStatus(
        serving_kind=status.serving_kind,
        target_kind=status.target_kind,
        built=status.built,
        total=status.total,
        bytes=status.bytes,
        build_cpu_s=status.build_cpu_s,
        error=status.error,
    )


def index_status_from_proto(msg: retrieval_pb2.IndexStatus) -> IndexStatus:
    """State of the index over a shard."""
    return IndexStatus(
        serving_kind=msg.serving_kind,
        target_kind=msg.target_kind,
        built=msg.built,
        total=msg.total,
        bytes=msg.bytes,
        build_cpu_s=msg.build_cpu_s,
        error=msg.error,
    )


def session_inventory_to_proto(inventory: SessionInventory) -> retrieval_pb2.SessionInventory:
    """An open session on a node."""
    return retrieval_pb2.SessionInventory(
        session_id=inventory.session_id,
        coordinator_id=inventory.coordinator_id,
        epoch=inventory.epoch,
    )


def session_inventory_from_proto(msg: retrieval_pb2.SessionInventory) -> SessionInventory:
    """An open session on a node."""
    return SessionInventory(msg.session_id, msg.coordinator_id, msg.epoch)


def shard_inventory_to_proto(inventory: ShardInventory) -> retrieval_pb2.ShardInventory:
    """A shard on a node."""
    return retrieval_pb2.ShardInventory(
        context_id=inventory.context_id,
        shard=shard_to_proto(inventory.shard),
        identity=identity_to_proto(inventory.identity),
        sealed=inventory.sealed,
        checksum=inventory.checksum,
        bytes_stored=inventory.bytes_stored,
        index=index_status_to_proto(inventory.index),
        snapshotted=inventory.snapshotted,
    )


def shard_inventory_from_proto(msg: retrieval_pb2.ShardInventory) -> ShardInventory:
    """A shard on a node."""
    return ShardInventory(
        context_id=msg.context_id,
        shard=shard_from_proto(msg.shard),
        identity=identity_from_proto(msg.identity),
        sealed=msg.sealed,
        checksum=msg.checksum,
        bytes_stored=msg.bytes_stored,
        index=index_status_from_proto(msg.index),
        snapshotted=msg.snapshotted,
    )


def node_stats_to_proto(stats: NodeStats) -> retrieval_pb2.StatsResponse:
    """Memory and counters of a node."""
    return retrieval_pb2.StatsResponse(
        memory_limit_bytes=stats.memory_limit_bytes,
        context_bytes=stats.context_bytes,
        index_bytes=stats.index_bytes,
        tail_bytes=stats.tail_bytes,
        rss_bytes=stats.rss_bytes,
        sessions=stats.sessions,
        attend_requests=stats.attend_requests,
        work=work_to_proto(stats.work),
        isa=stats.isa,
    )


def node_stats_from_proto(msg: retrieval_pb2.StatsResponse) -> NodeStats:
    """Memory and counters of a node."""
    return NodeStats(
        memory_limit_bytes=msg.memory_limit_bytes,
        context_bytes=msg.context_bytes,
        index_bytes=msg.index_bytes,
        tail_bytes=msg.tail_bytes,
        rss_bytes=msg.rss_bytes,
        sessions=msg.sessions,
        attend_requests=msg.attend_requests,
        work=work_from_proto(msg.work),
        isa=msg.isa,
    )


def model_info_to_proto(model: ModelInfo) -> worker_pb2.ModelInfo:
    """The model a worker serves."""
    return worker_pb2.ModelInfo(
        model=model.model,
        revision=model.revision,
        identity=identity_to_proto(model.identity),
        layers=[geometry_to_proto(layer) for layer in model.layers],
        max_positions=model.max_positions,
        vocab_size=model.vocab_size,
        source=model.source,
        eos_ids=model.eos_ids,
    )


def model_info_from_proto(msg: worker_pb2.ModelInfo) -> ModelInfo:
    """The model a worker serves."""
    return ModelInfo(
        model=msg.model,
        revision=msg.revision,
        identity=identity_from_proto(msg.identity),
        layers=tuple(geometry_from_proto(layer) for layer in msg.layers),
        max_positions=msg.max_positions,
        vocab_size=msg.vocab_size,
        source=msg.source,
        eos_ids=tuple(msg.eos_ids),
    )


def worker_status_to_proto(status: WorkerStatus) -> worker_pb2.StatusResponse:
    """What a worker is and what it holds."""
    return worker_pb2.StatusResponse(
        model=model_info_to_proto(status.model),
        device=status.device,
        max_sessions=status.max_sessions,
        sessions=status.sessions,
        max_row_tokens=status.max_row_tokens,
        sink_tokens=status.sink_tokens,
        window_tokens=status.window_tokens,
        resident_capacity_bytes=status.resident_capacity_bytes,
        resident_used_bytes=status.resident_used_bytes,
        rss_bytes=status.rss_bytes,
    )


def worker_status_from_proto(msg: worker_pb2.StatusResponse) -> WorkerStatus:
    """What a worker is and what it holds."""
    return WorkerStatus(
        model=model_info_from_proto(msg.model),
        device=msg.device,
        max_sessions=msg.max_sessions,
        sessions=msg.sessions,
        max_row_tokens=msg.max_row_tokens,
        sink_tokens=msg.sink_tokens,
        window_tokens=msg.window_tokens,
        resident_capacity_bytes=msg.resident_capacity_bytes,
        resident_used_bytes=msg.resident_used_bytes,
        rss_bytes=msg.rss_bytes,
    )
