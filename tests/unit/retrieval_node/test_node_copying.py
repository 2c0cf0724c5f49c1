"""Copies of shards from node to node: equal, verified, resumed, fenced, limited."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest
from node_harness import (
    SECRET,
    TENANT,
    Sequence,
    make_store,
    open_session,
    put,
    rows_for,
    write_capability,
)

from longreach.errors import (
    Cancelled,
    FailedPrecondition,
    Internal,
    PermissionDenied,
    ResourceExhausted,
    StaleEpoch,
    Unavailable,
)
from longreach.security import Capability, sign
from longreach.types import KvBlock, QuerySample, ShardEnd, Span
from retrieval_node.copying import Bandwidth, Copier
from tests.unit.telemetry.measured import measured


def leave(context_id: str = "ctx-test", epoch: int = 2, tenant: str = TENANT) -> bytes:
    """Leave to place a context."""
    return sign(Capability("place", tenant, context_id, time.time() + 60, epoch=epoch), SECRET)


class Wire:
    """A peer in the same process; `harm` changes what goes over, `parts` counts it."""

    def __init__(self, store, harm=lambda part: part):
        self._copier = Copier(store, Bandwidth(0), None)
        self._harm = harm
        self.blocks = []

    def read_shard(self, context_id, shard_id, capability, layer, start):
        never = threading.Event()
        for part in self._copier.read_shard(context_id, shard_id, capability, layer, start, never):
            if isinstance(part, KvBlock):
                self.blocks.append(part)
            yield self._harm(part)

    def close(self):
        pass


def copy(target, peer, capability=None, shard_id="shard-0-100", cancelled=None, rate=0):
    copier = Copier(target, Bandwidth(rate), lambda node_id, address: peer)
    return list(
        copier.copy(
            "ctx-test", shard_id, capability or leave(), "peer", "peer:1",
            cancelled or threading.Event(),
        )
    )  # fmt: skip


@pytest.fixture
def sequence():
    return Sequence(100)


@pytest.fixture
def source(sequence):
    store = make_store()
    put(store, sequence, sequence.shard())
    return store


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_copy_has_the_checksum_of_its_source_and_answers_the_same(dtype):
    sequence = Sequence(100, dtype)
    source, target = make_store(), make_store()
    checksum = put(source, sequence, sequence.shard())
    last = copy(target, Wire(source))[-1]
    assert (last.sealed, last.checksum, last.bytes_copied) == (True, checksum, last.bytes_total)
    results = []
    for store in (source, target):
        handle, _ = open_session(store, sequence, 100)
        rows = rows_for(handle, Span(0, 100), rows=3)
        results.append(store.attend(0, [rows], 0.25, 0.0).results[0].partial)
    assert np.array_equal(results[0].output, results[1].output)
    expected = sequence.reference(0, rows.queries, Span(0, 100))
    assert np.allclose(
        results[1].output, expected.output, atol=2e-2 if dtype != "float32" else 1e-5
    )
    # Again: nothing is sent.
    peer = Wire(source)
    assert copy(target, peer)[-1].sealed
    assert peer.blocks == []


def test_query_samples_go_along_from_memory_or_from_the_snapshot(sequence, tmp_path):
    queries = np.random.default_rng(3).normal(size=(4, 5, 8)).astype(np.float32)
    sample = QuerySample(0, 0, np.arange(5, dtype=np.int64), queries)
    source = make_store(kind="roargraph", snapshot_dir=tmp_path)
    with source.put(
        "ctx-test", sequence.shard(), sequence.identity, sequence.geometry, write_capability()
    ) as stream:
        stream.write(sequence.block(0, 100))
        stream.add_sample(sample)
    source.seal("ctx-test", "shard-0-100", write_capability(), sequence.token_ids)
    assert source._builder.wait_idle(30)
    assert source._snapshots.wait_idle(30)
    parts = list(Wire(source).read_shard("ctx-test", "shard-0-100", leave(), 0, 0))
    sent = [part for part in parts if isinstance(part, QuerySample)]
    assert len(sent) == 1
    assert np.array_equal(sent[0].queries, queries)
    source.close()


def test_damage_on_the_way_is_found_and_nothing_is_served(source, sequence):
    def harm(part):
        if isinstance(part, KvBlock) and part.layers == (1,):
            keys = part.keys.copy()
            keys[0, 0, 7, 0] += 1
            return dataclasses.replace(part, keys=keys)
        return part

    target = make_store()
    with measured("node") as read:
        with pytest.raises(Internal, match="checksum") as caught:
            copy(target, Wire(source, harm))
        assert read("checksum_failures") == 1
        assert read("copy_bytes", direction="in") == read("copy_bytes", direction="out") > 0
    assert caught.value.reason == "CHECKSUM_MISMATCH"
    assert target.inventory()[0] == []
    assert target.stats().context_bytes == 0
    assert copy(target, Wire(source))[-1].sealed


def test_a_checksum_that_is_not_that_of_the_bytes_is_found_too(source, sequence):
    def harm(part):
        return (
            dataclasses.replace(part, checksum=part.checksum ^ 1)
            if isinstance(part, ShardEnd)
            else part
        )

    with pytest.raises(Internal, match="checksum"):
        copy(make_store(), Wire(source, harm))


def test_a_copy_goes_on_where_it_was_interrupted(monkeypatch, sequence):
    monkeypatch.setattr("retrieval_node.reading.BLOCK_BYTES", 1024)
    source, target = make_store(), make_store()
    put(source, sequence, sequence.shard())
    seen = []

    def break_off(part):
        if isinstance(part, KvBlock):
            seen.append(part)
            if len(seen) == 9:
                raise Unavailable("the peer died")
        return part

    with pytest.raises(Unavailable):
        copy(target, Wire(source, break_off))
    assert target.inventory()[0][0].sealed is False
    rest = Wire(source)
    whole = Wire(source)
    assert copy(target, rest)[-1].sealed
    assert copy(make_store(), whole)[-1].sealed
    assert len(rest.blocks) == len(whole.blocks) - 8


def test_a_copy_stops_when_it_is_cancelled_and_takes_the_time_that_the_limit_says(source):
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(Cancelled):
        copy(make_store(), Wire(source), cancelled=cancelled, rate=1)
    now = [0.0]
    bandwidth = Bandwidth(100, lambda: now[0])
    assert [bandwidth.delay_s(50) for _ in range(3)] == [0.0, 0.5, 1.0]
    now[0] = 10.0
    assert bandwidth.delay_s(50) == 0.0
    assert Bandwidth(0).delay_s(1 << 40) == 0.0


def test_a_node_without_room_refuses(source):
    target = make_store(limit_bytes=1000)
    with pytest.raises(ResourceExhausted):
        copy(target, Wire(source))
    assert target.inventory()[0] == []


def test_what_an_older_map_wants_is_refused(source, sequence):
    target = make_store()
    copy(target, Wire(source), leave(epoch=5))
    with pytest.raises(StaleEpoch, match="epoch 5"):
        copy(target, Wire(source), leave(epoch=4))
    with pytest.raises(StaleEpoch):
        target.drop_shards("ctx-test", ["shard-0-100"], leave(epoch=4))
    assert target.drop_shards("ctx-test", ["shard-0-100"], leave(epoch=5)) > 0
    assert target.stats().context_bytes == 0


def test_a_shard_is_not_dropped_under_an_open_session(source, sequence):
    handle, _ = open_session(source, sequence, 100)
    with pytest.raises(FailedPrecondition, match="1 sessions"):
        source.drop_shards("ctx-test", ["shard-0-100"], leave())
    source.close_session(handle)
    assert source.drop_shards("ctx-test", ["shard-0-100"], leave()) > 0


def test_only_leave_to_place_this_context_counts(source):
    for capability in (write_capability(), leave("ctx-other")):
        with pytest.raises(PermissionDenied):
            copy(make_store(), Wire(source), capability)
    with pytest.raises(PermissionDenied):
        list(Wire(source).read_shard("ctx-test", "shard-0-100", write_capability(), 0, 0))
    with pytest.raises(PermissionDenied):
        copy(make_store(), Wire(source), leave(tenant="another"))


def test_a_shard_that_is_still_filling_is_not_a_source(sequence):
    source = make_store()
    with source.put(
        "ctx-test", sequence.shard(), sequence.identity, sequence.geometry, write_capability()
    ):
        pass
    with pytest.raises(FailedPrecondition, match="not sealed"):
        copy(make_store(), Wire(source))
