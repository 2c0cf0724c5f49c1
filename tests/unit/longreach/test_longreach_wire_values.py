"""Every domain value survives the wire, and values no honest peer sends are refused."""

import dataclasses
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longreach import errors, wire
from longreach.errors import InvalidRequest, MalformedTensor
from longreach.steps import (
    ModelInfo,
    PrefillProgress,
    PrefillSummary,
    StepOutcome,
    StepRow,
    StepRowResult,
    StepTiming,
    WorkerStatus,
)
from longreach.types import (
    BFLOAT16,
    AppendEntry,
    Budget,
    Identity,
    IndexStatus,
    KvBlock,
    LayerGeometry,
    NodeStats,
    QuerySample,
    SamplingParams,
    SessionRecord,
    Shard,
    ShardInventory,
    ShardMap,
    Span,
    WorkFigures,
)
from longreach.v1 import common_pb2, retrieval_pb2, worker_pb2

uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, 2**64 - 1)
positions = st.integers(0, 2**62)
positive = st.integers(1, 2**20)
names = st.text(string.printable + "é漢", max_size=12)
token_ids = st.lists(uint32, max_size=6).map(tuple)
float32 = st.floats(0, 1e6, width=32)

spans = st.tuples(positions, positions).map(lambda pair: Span(min(pair), max(pair)))
layer_numbers = st.sets(st.integers(0, 500), max_size=6).map(lambda each: tuple(sorted(each)))
identities = st.builds(
    Identity,
    names,
    names,
    st.sampled_from(["float32", "float16", "bfloat16"]),
    names,
    names,
    names,
)
geometries = st.builds(
    lambda layer, group, kv_heads, head_dim, value_dim, window: LayerGeometry(
        layer, group * kv_heads, kv_heads, head_dim, value_dim, window
    ),
    uint32,
    st.integers(1, 16),
    st.integers(1, 64),
    positive,
    positive,
    uint32,
)
shards = st.builds(
    lambda shard_id, span, layers, start, count, nodes: Shard(
        shard_id, span, layers, start, start + count, tuple(nodes)
    ),
    names,
    spans,
    layer_numbers,
    st.integers(0, 100),
    st.integers(1, 100),
    st.lists(st.sampled_from(["n1", "n2", "n3"]), max_size=3),
)
addresses = {"n1": "10.0.0.1:70", "n2": "10.0.0.2:70", "n3": "[::1]:70"}
shard_maps = st.builds(
    lambda held, policy, reason: ShardMap(tuple(held), addresses, policy, reason),
    st.lists(shards, max_size=4),
    names,
    names,
)
short_decimals = st.integers(1, 1000).map(lambda thousandths: thousandths / 1000)
budgets = st.one_of(
    st.builds(Budget, top_k=st.integers(1, 2**32 - 1), tail_estimate=st.booleans()),
    st.builds(
        Budget, mass=short_decimals, floor=uint32, ceiling=uint32, tail_estimate=st.booleans()
    ),
    st.builds(Budget, beta=short_decimals, tail_estimate=st.booleans()),
    st.builds(Budget, exact=st.just(True), tail_estimate=st.booleans()),
)
works = st.builds(WorkFigures, *[uint64] * 7)
samplings = st.builds(SamplingParams, short_decimals, short_decimals, uint32, uint64)
records = st.builds(
    SessionRecord,
    session_id=names.filter(bool),
    context_id=names.filter(bool),
    context_stop=positions,
    tenant=names,
    epoch=uint64,
    prompt_ids=token_ids,
    sampling=samplings,
    stop_ids=token_ids,
    stop_texts=st.lists(names, max_size=3).map(tuple),
    max_tokens=uint32,
)
index_statuses = st.builds(IndexStatus, names, names, uint32, uint32, uint64, float32, names)
inventories = st.builds(
    ShardInventory,
    names,
    shards,
    identities,
    st.booleans(),
    uint32,
    uint64,
    index_statuses,
    st.booleans(),
)
node_stats = st.builds(
    NodeStats, uint64, uint64, uint64, uint64, uint64, uint32, uint64, works, names
)
models = st.builds(
    ModelInfo,
    names,
    names,
    identities,
    st.lists(geometries, max_size=3).map(tuple),
    positions,
    uint32,
    names,
    token_ids,
)
worker_statuses = st.builds(
    WorkerStatus, models, names, uint32, uint32, uint32, uint32, uint32, uint64, uint64, uint64
)
summaries = st.builds(
    PrefillSummary, float32, float32, uint64, uint64, st.dictionaries(names, uint32, max_size=3)
)
progresses = st.builds(
    PrefillProgress,
    uint32,
    uint32,
    positions,
    positions,
    st.floats(0, 1, width=32),
    st.none() | summaries,
)
step_rows = st.builds(
    StepRow, names, positions, token_ids.filter(bool), st.booleans(), st.integers(0, 20)
)
logprobs = st.floats(-100, 0, width=32)
step_results = st.builds(
    StepRowResult,
    session_id=names,
    token_id=st.none() | uint32,
    logprob=logprobs,
    top_logprobs=st.lists(st.tuples(uint32, logprobs), max_size=3).map(tuple),
    work=works,
    coverage=st.floats(0, 1, width=32),
    acknowledged_stop=positions,
)

ROUND_TRIPS = {
    "span": spans,
    "identity": identities,
    "geometry": geometries,
    "shard": shards,
    "shard_map": shard_maps,
    "budget": budgets,
    "work": works,
    "sampling": samplings,
    "session_record": records,
    "index_status": index_statuses,
    "shard_inventory": inventories,
    "node_stats": node_stats,
    "model_info": models,
    "worker_status": worker_statuses,
    "prefill_progress": progresses,
    "step_row": step_rows,
    "step_result": step_results,
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_every_value_survives_the_wire(name, data):
    value = data.draw(ROUND_TRIPS[name])
    message = getattr(wire, f"{name}_to_proto")(value)
    again = type(message).FromString(message.SerializeToString())
    assert getattr(wire, f"{name}_from_proto")(again) == value


def test_a_step_outcome_survives_with_microsecond_times():
    outcome = StepOutcome(
        (StepRowResult("a", 5), StepRowResult("b", work=WorkFigures(7))),
        StepTiming(0.001, 0.020, 0.002, 0.003, 0.004, 0.0005, 0.0021, 0.000001),
    )
    message = wire.step_outcome_to_proto(outcome, 9)
    assert message.step_id == 9
    assert wire.step_outcome_from_proto(message) == outcome


def test_a_failed_row_travels_with_its_error_and_without_a_token():
    failed = StepRowResult("a", error=errors.StaleEpoch("epoch 3 is older than 4"))
    back = wire.step_result_from_proto(wire.step_result_to_proto(failed))
    assert isinstance(back.error, errors.StaleEpoch)
    assert back.error.message == "epoch 3 is older than 4"
    assert back.token_id is None


def test_token_zero_is_not_mistaken_for_no_token():
    back = wire.step_result_from_proto(wire.step_result_to_proto(StepRowResult("a", 0)))
    assert back.token_id == 0


def test_times_outside_what_the_wire_can_say_are_clamped():
    outcome = StepOutcome((), StepTiming(queue_s=-1e-9, total_s=1e9))
    timing = wire.step_outcome_to_proto(outcome).timing
    assert (timing.queue_us, timing.total_us) == (0, 2**32 - 1)


def kv_block(dtype=BFLOAT16, layers=(3, 4), positions=5, start=128):
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((len(layers), 2, positions, 8)).astype(dtype)
    values = rng.standard_normal((len(layers), 2, positions, 6)).astype(dtype)
    return KvBlock(layers, 4, start, keys, values)


def assert_same_block(back: KvBlock, block: KvBlock):
    assert (back.layers, back.kv_head_start, back.start) == (
        block.layers,
        block.kv_head_start,
        block.start,
    )
    assert back.keys.dtype == block.keys.dtype
    np.testing.assert_array_equal(back.keys, block.keys)
    np.testing.assert_array_equal(back.values, block.values)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
def test_a_kv_block_survives_in_every_storage_dtype(dtype):
    block = kv_block(dtype)
    assert_same_block(wire.kv_block_from_proto(wire.kv_block_to_proto(block)), block)


def test_kv_blocks_whose_parts_disagree_are_refused():
    block = kv_block()
    fewer_values = dataclasses.replace(block, values=block.values[:, :, :4])
    with pytest.raises(MalformedTensor, match="values"):
        wire.kv_block_from_proto(wire.kv_block_to_proto(fewer_values))
    other_dtype = dataclasses.replace(block, values=block.values.astype(np.float32))
    with pytest.raises(MalformedTensor, match="dtype float32, expected bfloat16"):
        wire.kv_block_from_proto(wire.kv_block_to_proto(other_dtype))
    more_layers = dataclasses.replace(block, layers=(3, 4, 5))
    with pytest.raises(MalformedTensor, match=r"expected \[3, any, any, any\]"):
        wire.kv_block_from_proto(wire.kv_block_to_proto(more_layers))
    unordered = dataclasses.replace(block, layers=(4, 3))
    with pytest.raises(InvalidRequest, match="ascend"):
        wire.kv_block_from_proto(wire.kv_block_to_proto(unordered))
    integers = dataclasses.replace(block, keys=np.zeros((2, 2, 5, 8), np.int32))
    with pytest.raises(MalformedTensor, match="dtype int32"):
        wire.kv_block_from_proto(wire.kv_block_to_proto(integers))
    before_zero = dataclasses.replace(block, start=-1)
    with pytest.raises(InvalidRequest, match="position -1"):
        wire.kv_block_from_proto(wire.kv_block_to_proto(before_zero))


def test_nan_in_keys_is_refused_where_the_receiver_asks_for_it():
    block = kv_block()
    block.keys[1, 0, 2, 3] = np.nan
    message = wire.kv_block_to_proto(block)
    wire.kv_block_from_proto(message)
    with pytest.raises(MalformedTensor, match=r"\[1, 0, 2, 3\]"):
        wire.kv_block_from_proto(message, finite=True)


def test_a_query_sample_survives_and_needs_one_query_for_each_position():
    sample = QuerySample(7, 2, np.array([5, 9, 11]), np.ones((4, 3, 8), np.float16))
    back = wire.query_sample_from_proto(wire.query_sample_to_proto(sample))
    assert (back.layer, back.kv_head_start) == (7, 2)
    np.testing.assert_array_equal(back.positions, sample.positions)
    np.testing.assert_array_equal(back.queries, sample.queries)
    short = dataclasses.replace(sample, positions=np.array([5, 9]))
    with pytest.raises(MalformedTensor, match="queries"):
        wire.query_sample_from_proto(wire.query_sample_to_proto(short))
    negative = dataclasses.replace(sample, positions=np.array([-5, 9, 11]))
    with pytest.raises(MalformedTensor, match="-5"):
        wire.query_sample_from_proto(wire.query_sample_to_proto(negative))


def test_an_append_entry_survives_and_its_blocks_cover_its_tokens():
    entry = AppendEntry(2**63 + 5, 3, 128, (10, 11, 12, 13, 14), (kv_block(), kv_block()))
    back = wire.append_entry_from_proto(wire.append_entry_to_proto(entry))
    assert (back.handle, back.epoch, back.start) == (entry.handle, entry.epoch, entry.start)
    assert back.token_ids == entry.token_ids
    for one, other in zip(back.blocks, entry.blocks, strict=True):
        assert_same_block(one, other)
    for wrong in (
        dataclasses.replace(entry, token_ids=(10, 11)),
        dataclasses.replace(entry, start=129),
    ):
        with pytest.raises(InvalidRequest, match=r"block of \[128, 133\)"):
            wire.append_entry_from_proto(wire.append_entry_to_proto(wrong))


@pytest.mark.parametrize(
    ("decode", "message", "complaint"),
    [
        (wire.span_from_proto, common_pb2.Span(start=5, stop=4), r"\[5, 4\)"),
        (wire.span_from_proto, common_pb2.Span(start=-1, stop=4), r"\[-1, 4\)"),
        (wire.identity_from_proto, common_pb2.Identity(dtype=4), "storage dtypes are"),
        (wire.identity_from_proto, common_pb2.Identity(), "dtype number 0"),
        (
            wire.geometry_from_proto,
            common_pb2.LayerGeometry(q_heads=9, kv_heads=2, head_dim=8, value_dim=8),
            "multiple of kv_heads",
        ),
        (wire.geometry_from_proto, common_pb2.LayerGeometry(q_heads=8), "must be positive"),
        (wire.shard_from_proto, common_pb2.Shard(shard_id="s"), "name at least one"),
        (
            wire.shard_map_from_proto,
            common_pb2.ShardMap(
                shards=[common_pb2.Shard(shard_id="s", kv_head_stop=1, node_ids=["n9"])]
            ),
            "'n9', which has no address",
        ),
        (wire.budget_from_proto, common_pb2.Budget(), "no rule"),
        (wire.budget_from_proto, common_pb2.Budget(all=False), "no rule"),
        (wire.budget_from_proto, common_pb2.Budget(top_k=0), "top_k is 0"),
        (
            wire.budget_from_proto,
            common_pb2.Budget(mass=common_pb2.MassRule(mass=float("nan"))),
            "mass is nan",
        ),
        (
            wire.sampling_from_proto,
            common_pb2.SamplingParams(temperature=float("inf")),
            "temperature is inf",
        ),
        (wire.sampling_from_proto, common_pb2.SamplingParams(top_p=1.5), "top_p is 1.5"),
        (wire.session_record_from_proto, common_pb2.SessionRecord(), "session_id is empty"),
        (
            wire.session_record_from_proto,
            common_pb2.SessionRecord(session_id="s", context_stop=5),
            "a session without a context",
        ),
        (
            wire.step_row_from_proto,
            worker_pb2.StepRow(session_id="s", position=5),
            "0 tokens at position 5",
        ),
    ],
)
def test_values_no_honest_peer_sends_are_refused(decode, message, complaint):
    with pytest.raises(InvalidRequest, match=complaint):
        decode(message)


def test_an_identity_with_a_dtype_nobody_stores_is_refused_when_sent():
    with pytest.raises(InvalidRequest, match="'int7'"):
        wire.identity_to_proto(Identity("m", "r", "int7"))


def test_unknown_fields_of_a_newer_peer_are_ignored():
    stats = wire.node_stats_from_proto(retrieval_pb2.StatsResponse.FromString(b"\xf8\x3f\x05"))
    assert stats == NodeStats(0, 0, 0, 0, 0, 0, 0, WorkFigures(), "")
