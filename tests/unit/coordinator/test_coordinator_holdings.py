"""What follows from the nodes' inventories: states, leftovers, rebuilt records."""

from __future__ import annotations

import dataclasses

import pytest
from coordinator_doubles import model_info

from coordinator.catalog.base import ContextRecord, ContextState
from coordinator.holdings import Holdings, interrupted, leftovers, rebuild, settled
from coordinator.placement.base import ClusterView, ContextToPlace, NodeView
from coordinator.placement.planner import place
from longreach.types import IndexStatus, ShardInventory, Span

MODEL = model_info()
IDENTITY = dataclasses.replace(MODEL.identity, tenant="t")
VIEW = ClusterView(tuple(NodeView(f"n{i}", f"a:{i}", 4, 1 << 30) for i in range(2)))


def _record(policy="layer", state=ContextState.READY, context_id="ctx-1"):
    to_place = ContextToPlace(context_id, Span(0, 500), MODEL.layers, 4, 500)
    shard_map = place(to_place, VIEW, policy)
    return ContextRecord(
        context_id, "", IDENTITY, state, 500, to_place.room_bytes, 1.0, shard_map, 1.0
    )


def _inventory(record, node_id, sealed=True):
    return [
        ShardInventory(
            record.context_id, shard, record.identity, sealed, 1, 50,
            IndexStatus("flat", "flat", 0, 0, 0), False,
        )
        for shard in record.shard_map.shards
        if node_id in shard.node_ids
    ]  # fmt: skip


def _reported(record):
    holdings = Holdings()
    for node_id in record.node_ids:
        holdings.report(node_id, _inventory(record, node_id))
    return holdings


@pytest.mark.parametrize("policy", ["layer", "head_group", "round_robin"])
def test_a_context_is_ready_exactly_when_every_shard_is_sealed_somewhere(policy):
    record = _record(policy, ContextState.UNAVAILABLE)
    holdings = Holdings()
    for node_id in record.node_ids:
        assert settled(record, holdings.missing(record)).state is ContextState.UNAVAILABLE
        holdings.report(node_id, _inventory(record, node_id))
    assert settled(record, holdings.missing(record)).state is ContextState.READY
    holdings.lost("n1")
    lost = settled(record, holdings.missing(record))
    assert lost.state is ContextState.UNAVAILABLE
    assert "n1" in lost.error


def test_a_shard_that_is_not_sealed_does_not_count():
    record = _record()
    holdings = _reported(record)
    holdings.report("n0", _inventory(record, "n0", sealed=False))
    assert {n for shard in holdings.missing(record) for n in shard.node_ids} == {"n0"}


def test_a_shard_of_another_map_does_not_count():
    holdings = _reported(_record("head_group"))
    record = _record("layer")
    assert len(holdings.missing(record)) == len(record.shard_map.shards)


def test_a_prefill_counts_at_once_and_outlives_an_older_inventory():
    record = _record()
    holdings = Holdings()
    holdings.sealed(record)
    holdings.report("n0", [])
    assert holdings.missing(record) == []
    holdings.lost("n0")
    assert {n for shard in holdings.missing(record) for n in shard.node_ids} == {"n0"}


def test_what_was_dropped_is_missing():
    record = _record()
    holdings = _reported(record)
    holdings.sealed(record)
    holdings.dropped(record.context_id)
    assert len(holdings.missing(record)) == len(record.shard_map.shards)


def test_a_failed_context_stays_failed():
    record = _record(state=ContextState.FAILED)
    assert settled(record, []) is record


def test_what_was_being_stored_when_the_coordinator_ended_has_failed_and_is_dropped():
    for state in (ContextState.RESERVED, ContextState.FILLING):
        record = interrupted(_record(state=state))
        assert record.state is ContextState.FAILED
        assert "create it again" in record.error
        inventory = _inventory(record, "n0")
        assert leftovers(inventory, {"ctx-1": record}, ()) == {"ctx-1": "t"}
    ready = _record()
    assert interrupted(ready) is ready


def test_a_node_drops_deleted_contexts_and_interrupted_prefills_but_no_copy_of_a_stored_one():
    record = _record()
    elsewhere = dataclasses.replace(_record("head_group"), context_id="ctx-moved")
    planned = dataclasses.replace(_record("layer"), context_id="ctx-moved")
    half = dataclasses.replace(record, context_id="ctx-half")
    deleted = dataclasses.replace(record, context_id="ctx-deleted")
    unknown = dataclasses.replace(record, context_id="ctx-unknown")
    inventory = [
        *_inventory(record, "n0"),
        *_inventory(elsewhere, "n0"),
        *_inventory(half, "n0", sealed=False),
        *_inventory(deleted, "n0"),
        *_inventory(unknown, "n0"),
    ]
    records = {each.context_id: each for each in (record, planned)}
    assert leftovers(inventory, records, {"ctx-deleted"}) == {
        "ctx-half": "t",
        "ctx-deleted": "t",
    }


@pytest.mark.parametrize("policy", ["layer", "head_group", "round_robin", "span"])
def test_a_catalog_rebuilt_from_inventories_equals_the_catalog(policy):
    record = _record(policy)
    unknown = _reported(record).unknown(known=())
    found = rebuild(
        "ctx-1", unknown["ctx-1"], record.shard_map.addresses, [MODEL], record.created_at
    )
    same = dataclasses.replace(
        record,
        kv_bytes=50 * len(record.shard_map.shards),
        shard_map=dataclasses.replace(
            record.shard_map, policy="rebuilt", reason=found.shard_map.reason
        ),
    )
    assert found == same


def test_replicas_become_one_shard_with_two_nodes():
    record = _record()
    by_node = {"n0": [], "n1": []}
    for shard in record.shard_map.shards:
        both = dataclasses.replace(shard, node_ids=("n0", "n1"))
        item = dataclasses.replace(_inventory(record, shard.node_ids[0])[0], shard=both)
        by_node["n0"].append(item)
        by_node["n1"].append(item)
    found = rebuild("ctx-1", by_node, {}, [MODEL], 1.0)
    assert {shard.node_ids for shard in found.shard_map.shards} == {("n0", "n1")}


def test_a_context_that_is_not_whole_is_not_rebuilt():
    record = _record()
    whole = _reported(record).unknown(known=())["ctx-1"]
    assert rebuild("ctx-1", {"n0": whole["n0"]}, {}, [MODEL], 1.0) is None
    assert (
        rebuild("ctx-1", whole, {}, [model_info(revision="other", identity=IDENTITY)], 1.0) is None
    )
    assert rebuild("ctx-1", whole, {}, [], 1.0) is None


def test_a_context_in_runs_is_whole_only_with_every_run():
    record = _record("span")
    assert len({shard.span for shard in record.shard_map.shards}) == 2
    holdings = _reported(record)
    holdings.lost("n1")
    unknown = holdings.unknown(known=())
    assert rebuild("ctx-1", unknown["ctx-1"], {}, [MODEL], 1.0) is None


def test_a_rebuilt_context_wants_the_copies_it_had_though_not_all_nodes_are_there_yet():
    to_place = ContextToPlace("ctx-1", Span(0, 500), MODEL.layers, 4, 500)
    shard_map = place(to_place, VIEW, "layer", replicas=2)
    record = dataclasses.replace(_record(), shard_map=shard_map, replicas=2)
    found = rebuild("ctx-1", {"n0": _inventory(record, "n0")}, {}, [MODEL], 1.0)
    assert found.replicas == 2
    assert all(shard.node_ids == ("n0",) for shard in found.shard_map.shards)
    one = _record("head_group")
    by_node = {name: _inventory(one, name) for name in one.node_ids}
    assert rebuild("ctx-1", by_node, {}, [MODEL], 1.0, replicas=2).replicas == 2
