"""K, V and prefill queries on their way to nodes and back."""

from __future__ import annotations

import numpy as np

from longreach.errors import InvalidRequest, MalformedTensor
from longreach.types import (
    STORAGE_DTYPES,
    AppendEntry,
    KvBlock,
    QuerySample,
    ShardEnd,
    ShardHeader,
    ShardPart,
)
from longreach.v1 import common_pb2, retrieval_pb2
from longreach.wire.placement import (
    geometry_from_proto,
    geometry_to_proto,
    identity_from_proto,
    identity_to_proto,
    layers_from_proto,
    shard_from_proto,
    shard_to_proto,
)
from longreach.wire.tensor import tensor_from_proto, tensor_to_proto

_POSITION_DTYPE = np.dtype("<i8")


def kv_block_to_proto(block: KvBlock) -> common_pb2.KvBlock:
    """K and V of a run of positions."""
    return common_pb2.KvBlock(
        layers=block.layers,
        kv_head_start=block.kv_head_start,
        start=block.start,
        keys=tensor_to_proto(block.keys),
        values=tensor_to_proto(block.values),
    )


def kv_block_from_proto(msg: common_pb2.KvBlock, *, finite: bool = False) -> KvBlock:
    """K and V of a run of positions: equal dtypes, one entry of the first axis for each layer."""
    layers = layers_from_proto(msg.layers, name="KV block")
    if msg.start < 0:
        raise InvalidRequest(f"KV block starts at position {msg.start}; positions count from 0")
    keys = tensor_from_proto(
        msg.keys,
        name="keys [layers, kv_heads, positions, head_dim]",
        shape=(len(layers), None, None, None),
        dtype=STORAGE_DTYPES,
        finite=finite,
    )
    values = tensor_from_proto(
        msg.values,
        name="values [layers, kv_heads, positions, value_dim]",
        shape=(*keys.shape[:3], None),
        dtype=keys.dtype,
        finite=finite,
    )
    return KvBlock(layers, msg.kv_head_start, msg.start, keys, values)


def query_sample_to_proto(sample: QuerySample) -> retrieval_pb2.QuerySample:
    """Prefill queries of one layer."""
    return retrieval_pb2.QuerySample(
        layer=sample.layer,
        kv_head_start=sample.kv_head_start,
        positions=tensor_to_proto(sample.positions),
        queries=tensor_to_proto(sample.queries),
    )


def query_sample_from_proto(msg: retrieval_pb2.QuerySample) -> QuerySample:
    """Prefill queries of one layer, finite, one for each position."""
    positions = tensor_from_proto(
        msg.positions, name="positions [n]", shape=(None,), dtype=_POSITION_DTYPE
    )
    if positions.size and int(positions.min()) < 0:
        raise MalformedTensor(f"positions [n]: {int(positions.min())}; positions count from 0")
    queries = tensor_from_proto(
        msg.queries,
        name="queries [q_heads, n, head_dim]",
        shape=(None, positions.shape[0], None),
        dtype=STORAGE_DTYPES,
        finite=True,
    )
    return QuerySample(msg.layer, msg.kv_head_start, positions, queries)


def shard_part_to_proto(part: ShardPart) -> retrieval_pb2.ReadShardResponse:
    """A part of a shard that is copied."""
    match part:
        case ShardHeader():
            header = retrieval_pb2.PutHeader(
                context_id=part.context_id,
                shard=shard_to_proto(part.shard),
                identity=identity_to_proto(part.identity),
                layers=[geometry_to_proto(each) for each in part.geometry],
            )
            return retrieval_pb2.ReadShardResponse(header=header)
        case KvBlock():
            return retrieval_pb2.ReadShardResponse(block=kv_block_to_proto(part))
        case QuerySample():
            return retrieval_pb2.ReadShardResponse(sample=query_sample_to_proto(part))
        case ShardEnd():
            end = retrieval_pb2.ShardEnd(
                checksum=part.checksum, token_ids=tensor_to_proto(part.token_ids)
            )
            return retrieval_pb2.ReadShardResponse(end=end)


def shard_part_from_proto(msg: retrieval_pb2.ReadShardResponse) -> ShardPart:
    """A part of a shard that is copied; raises InvalidRequest for an empty message."""
    match msg.WhichOneof("part"):
        case "header":
            return ShardHeader(
                msg.header.context_id,
                shard_from_proto(msg.header.shard),
                identity_from_proto(msg.header.identity),
                tuple(geometry_from_proto(each) for each in msg.header.layers),
            )
        case "block":
            return kv_block_from_proto(msg.block)
        case "sample":
            return query_sample_from_proto(msg.sample)
        case "end":
            token_ids = tensor_from_proto(
                msg.end.token_ids, name="token_ids [span]", shape=(None,), dtype=np.dtype("<i4")
            )
            return ShardEnd(token_ids, msg.end.checksum)
        case other:
            raise InvalidRequest(
                f"a shard consists of header, blocks, samples and end, not {other}"
            )


def append_entry_to_proto(entry: AppendEntry) -> retrieval_pb2.AppendEntry:
    """New KV of one session."""
    return retrieval_pb2.AppendEntry(
        handle=entry.handle,
        epoch=entry.epoch,
        start=entry.start,
        token_ids=entry.token_ids,
        blocks=[kv_block_to_proto(block) for block in entry.blocks],
    )


def append_entry_from_proto(msg: retrieval_pb2.AppendEntry) -> AppendEntry:
    """New KV of one session; every block covers exactly the positions of the token ids."""
    token_ids = tuple(msg.token_ids)
    blocks = tuple(kv_block_from_proto(block) for block in msg.blocks)
    for block in blocks:
        if block.start != msg.start or block.keys.shape[2] != len(token_ids):
            raise InvalidRequest(
                f"append at [{msg.start}, {msg.start + len(token_ids)}) holds a block of "
                f"{block.span}; blocks must cover exactly the positions of the token ids"
            )
    if msg.start < 0:
        raise InvalidRequest(f"append starts at position {msg.start}; positions count from 0")
    return AppendEntry(msg.handle, msg.epoch, msg.start, token_ids, blocks)
