"""Snapshots: a restarted node serves what it held; damaged files are never served."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from node_harness import (
    SCALE,
    Sequence,
    make_store,
    open_session,
    put,
    rows_for,
    write_capability,
)
from safetensors import safe_open

from longreach.errors import Unavailable
from longreach.types import QuerySample, Span
from retrieval_node.memory import MemoryBudget
from retrieval_node.shard_file import read_shard
from retrieval_node.store import Store
from retrieval_node.tensor_file import BrokenFileError, TensorFile, write_tensors
from tests.unit.telemetry.measured import measured


def wait_written(store: Store) -> None:
    assert store._snapshots is not None
    assert store._snapshots.wait_idle(20)


def files(directory: Path, suffix: str = ".safetensors") -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.suffix == suffix)


def saved(directory: Path, sequence: Sequence) -> Path:
    """A snapshot of the sequence, written by a store that is gone since."""
    store = make_store(snapshot_dir=directory)
    put(store, sequence, sequence.shard())
    wait_written(store)
    store.close()
    (path,) = files(directory)
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_restarted_node_serves_what_it_had_sealed(tmp_path, dtype):
    sequence = Sequence(40, dtype=dtype)
    first = make_store(snapshot_dir=tmp_path)
    put(first, sequence, sequence.shard(0, 24))
    put(first, sequence, sequence.shard(24, 40))
    wait_written(first)
    before, _ = first.inventory()
    assert all(shard.snapshotted for shard in before)
    second = make_store(snapshot_dir=tmp_path)
    assert second.load_snapshots() == 2
    assert second.inventory()[0] == before
    assert second.stats().context_bytes == first.stats().context_bytes
    handle, _ = open_session(second, sequence, 40)
    rows = rows_for(handle, Span(0, 40))
    (result,) = second.attend(1, [rows], SCALE, 0.0).results
    expected = sequence.reference(1, rows.queries, Span(0, 40))
    np.testing.assert_allclose(result.partial.output, expected.output, atol=1e-4)


def test_no_session_opens_over_a_context_while_snapshots_are_read(tmp_path):
    sequence = Sequence(40)
    saved(tmp_path, sequence)
    node = make_store(snapshot_dir=tmp_path)
    node.expect_snapshots()
    with pytest.raises(Unavailable, match="reading its snapshots") as refused:
        open_session(node, sequence, 40)
    assert refused.value.retry_after_s
    assert node.load_snapshots() == 1
    open_session(node, sequence, 40)


def test_a_node_without_snapshots_is_not_kept_waiting_for_them(tmp_path):
    node = make_store()
    node.expect_snapshots()
    assert node.load_snapshots() == 0
    sequence = Sequence(40)
    put(node, sequence, sequence.shard())
    open_session(node, sequence, 40)


def test_filling_shards_and_tails_are_not_kept(tmp_path):
    sequence = Sequence(20)
    store = make_store(snapshot_dir=tmp_path)
    with store.put(
        "ctx-test", sequence.shard(), sequence.identity, sequence.geometry, write_capability()
    ) as stream:
        stream.write(sequence.block(0, 20))
    wait_written(store)
    assert files(tmp_path) == []


def test_the_safetensors_package_reads_the_file(tmp_path):
    sequence = Sequence(20)
    path = saved(tmp_path, sequence)
    tensors = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(tensors["keys.1"], sequence.keys[1])
    np.testing.assert_array_equal(tensors["values.0"], sequence.values[0])
    np.testing.assert_array_equal(tensors["token_ids"], sequence.token_ids)
    with safe_open(path, "numpy") as file:
        about = json.loads(file.metadata()["description"])
    assert about["identity"]["tenant"] == sequence.identity.tenant
    assert about["context_id"] == "ctx-test"


def test_query_samples_come_back_for_the_index_to_be_built_again(tmp_path):
    sequence = Sequence(20)
    store = make_store(snapshot_dir=tmp_path)
    sample = QuerySample(1, 0, np.array([2, 5]), np.ones((4, 2, 8), np.float32))
    with store.put(
        "ctx-test", sequence.shard(), sequence.identity, sequence.geometry, write_capability()
    ) as stream:
        stream.write(sequence.block(0, 20))
        stream.add_sample(sample)
    store.seal("ctx-test", "shard-0-20", write_capability(), sequence.token_ids)
    wait_written(store)
    loaded = read_shard(files(tmp_path)[0], MemoryBudget(1 << 20))
    np.testing.assert_array_equal(loaded.samples[1].positions, sample.positions)
    np.testing.assert_array_equal(loaded.samples[1].queries, sample.queries)


def test_a_drop_removes_the_files(tmp_path):
    sequence = Sequence(20)
    store = make_store(snapshot_dir=tmp_path)
    put(store, sequence, sequence.shard())
    put(store, Sequence(8, context_id="ctx-kept"), Sequence(8).shard())
    wait_written(store)
    assert len(files(tmp_path)) == 2
    store.drop("ctx-test", write_capability())
    assert len(files(tmp_path)) == 1
    again = make_store(snapshot_dir=tmp_path)
    assert again.load_snapshots() == 1
    assert [shard.context_id for shard in again.inventory()[0]] == ["ctx-kept"]
    again.drop("ctx-kept", write_capability("ctx-kept"))
    assert files(tmp_path) == []


def test_a_drop_that_comes_before_the_write_leaves_no_file(tmp_path):
    sequence = Sequence(20)
    for _ in range(10):
        store = make_store(snapshot_dir=tmp_path)
        put(store, sequence, sequence.shard())
        store.drop("ctx-test", write_capability())
        wait_written(store)
        assert os.listdir(tmp_path) == []
        store.close()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_file_that_was_cut_short_is_put_aside_and_not_served(tmp_path, share):
    path = saved(tmp_path, Sequence(40))
    with open(path, "r+b") as file:
        file.truncate(int(path.stat().st_size * share))
    store = make_store(snapshot_dir=tmp_path)
    with measured("node") as read:
        assert store.load_snapshots() == 0
        assert read("checksum_failures") == read("snapshot_failures") == 1
    assert store.inventory() == ([], [])
    assert store.stats().context_bytes == 0
    assert files(tmp_path) == []
    assert len(files(tmp_path, ".corrupt")) == 1


def test_no_flipped_bit_of_a_file_is_ever_served(tmp_path):
    path = saved(tmp_path, Sequence(6))
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        memory = MemoryBudget(1 << 20)
        try:
            loaded = read_shard(path, memory)
        except BrokenFileError:
            continue
        # What still loads must be what was written: the flip hit bytes without a meaning.
        path.write_bytes(whole)
        original = read_shard(path, MemoryBudget(1 << 20))
        assert loaded.sealed.checksum == original.sealed.checksum
        assert loaded.sealed.identity == original.sealed.identity
        assert loaded.sealed.shard == original.sealed.shard
        assert (loaded.sealed.token_ids == original.sealed.token_ids).all()


def test_what_does_not_fit_into_memory_stays_on_disk(tmp_path):
    saved(tmp_path, Sequence(400))
    store = make_store(limit_bytes=1000, snapshot_dir=tmp_path)
    assert store.load_snapshots() == 0
    assert len(files(tmp_path)) == 1
    assert store.stats().context_bytes == 0


def test_two_files_of_one_shard_serve_it_once(tmp_path):
    path = saved(tmp_path, Sequence(20))
    path.with_stem("copy").write_bytes(path.read_bytes())
    store = make_store(snapshot_dir=tmp_path)
    assert store.load_snapshots() == 1
    (shard,), _ = store.inventory()
    assert store.stats().context_bytes == shard.bytes_stored + 20 * 4


def test_what_an_interrupted_write_left_is_removed_at_start(tmp_path):
    (tmp_path / "half.tmp").write_bytes(b"half")
    make_store(snapshot_dir=tmp_path)
    assert os.listdir(tmp_path) == []


def test_ids_cannot_steer_a_file_out_of_the_directory(tmp_path):
    sequence = Sequence(8, context_id="../../evil")
    inside = tmp_path / "snapshots"
    store = make_store(snapshot_dir=inside)
    put(store, sequence, sequence.shard(shard_id="/etc/passwd"))
    wait_written(store)
    assert len(files(inside)) == 1
    assert os.listdir(tmp_path) == ["snapshots"]


def test_a_disk_error_leaves_the_shard_served_and_marked_as_not_snapshotted(tmp_path):
    sequence = Sequence(8)
    store = make_store(snapshot_dir=tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    put(store, sequence, sequence.shard())
    wait_written(store)
    (shard,), _ = store.inventory()
    assert (shard.sealed, shard.snapshotted) == (True, False)


def test_a_header_that_asks_for_more_than_the_file_has_is_refused_before_allocation(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": np.zeros(4, np.float32)}, {})
    data = bytearray(path.read_bytes())
    data[:8] = (1 << 60).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(BrokenFileError, match="header"):
        TensorFile(path)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": 4}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}},
        {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"a": [0, 4]},
        {"__metadata__": [1]},
        {"__metadata__": None},
        [1, 2],
        3,
    ],
    ids=str,
)
def test_a_header_that_is_json_but_no_header_is_refused(tmp_path, header):
    if isinstance(header, dict):
        header = {"__metadata__": {}} | header
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(BrokenFileError, match="header"):
        TensorFile(path)
