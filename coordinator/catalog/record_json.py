"""Context records as JSON, for catalogs that store text."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from coordinator.catalog.base import ContextRecord, ContextState
from longreach.types import Identity, Shard, ShardMap, Span


def record_to_json(record: ContextRecord) -> str:
    """The record as one JSON object."""
    fields = dataclasses.asdict(record)
    fields["state"] = record.state.name
    return json.dumps(fields, separators=(",", ":"))


def record_from_json(text: str) -> ContextRecord:
    """The record that `record_to_json` wrote; fields added since then take their defaults."""
    fields: dict[str, Any] = json.loads(text)
    shard_map = fields["shard_map"]
    fields["state"] = ContextState[fields["state"]]
    fields["identity"] = Identity(**fields["identity"])
    fields["shard_map"] = ShardMap(
        shards=tuple(_shard(each) for each in shard_map["shards"]),
        addresses=shard_map["addresses"],
        policy=shard_map["policy"],
        reason=shard_map["reason"],
        epoch=shard_map.get("epoch", 1),
    )
    return ContextRecord(**fields)


def _shard(fields: dict[str, Any]) -> Shard:
    return Shard(
        shard_id=fields["shard_id"],
        span=Span(**fields["span"]),
        layers=tuple(fields["layers"]),
        kv_head_start=fields["kv_head_start"],
        kv_head_stop=fields["kv_head_stop"],
        node_ids=tuple(fields["node_ids"]),
    )
