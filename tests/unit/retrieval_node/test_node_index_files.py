"""Index files: every kind that is kept on disk answers as before, and damage is always noticed."""

from __future__ import annotations

import json
import logging
import struct
import threading
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from node_harness import SCALE, Sequence, make_store, open_session, rows_for, write_capability

import retrieval_node.index  # noqa: F401  (registers every kind)
from longreach.errors import FailedPrecondition
from longreach.types import Budget, LayerGeometry, QuerySample, Span
from retrieval_node.index import auto
from retrieval_node.index.base import INDEX_KINDS, BuildControl, Index, IndexRows, LayerKv
from retrieval_node.index.persistence import OTHER, read_index, write_index
from retrieval_node.store import Store

SAVED_KINDS = [kind for kind in INDEX_KINDS if INDEX_KINDS[kind].format_version]
KEYS = 200
BINDING = {"shard_crc32": "0123abcd", "layer": "3"}
ROWS = IndexRows(
    np.random.default_rng(5).normal(size=(2, 2, 2, 16)).astype(np.float32),
    0,
    Span(0, 1000),
    Budget(top_k=5, tail_estimate=True),
)


@cache
def layer_kv(seed: int = 0) -> LayerKv:
    rng = np.random.default_rng(seed)
    keys, values = (rng.normal(size=(2, KEYS, dim)).astype("bfloat16") for dim in (16, 8))
    return LayerKv(keys, values, 64)


@cache
def built(kind: str) -> Index:
    queries = np.random.default_rng(1).normal(size=(4, 50, 16)).astype(np.float32)
    sample = QuerySample(0, 0, np.arange(64, 114), queries)
    control = BuildControl(lambda built, total: None, threading.Event())
    return INDEX_KINDS[kind].build(layer_kv(), sample, control)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("indexes")


def file_of(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.index"
    if not path.exists():
        write_index(path, built(kind), layer_kv(), kind, BINDING)
    return path


def read(path: Path, kind: str) -> Index:
    return read_index(path, layer_kv(), kind, BINDING)


def assert_same_answers(one: Index, other: Index) -> None:
    for budget in ("exact", "top_k=5", "top_k=5+tail", "mass=0.8", "beta=2"):
        rows = IndexRows(ROWS.queries, 0, ROWS.scope, Budget.parse(budget))
        (a,), (b,) = one.attend([rows], 0.3), other.attend([rows], 0.3)
        np.testing.assert_array_equal(a.partial.output, b.partial.output)
        np.testing.assert_array_equal(a.partial.lse, b.partial.lse)
        assert a.work == b.work


def sections(whole: bytes) -> list[int]:
    """Every place where a part of the file begins or ends."""
    header_bytes = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + header_bytes])
    header.pop("__metadata__")
    data = 8 + header_bytes
    edges = {data + edge for each in header.values() for edge in each["data_offsets"]}
    return sorted({0, 8, data} | edges)


def test_every_kind_with_a_build_but_those_that_choose_is_kept_on_disk() -> None:
    with_build = {kind for kind in INDEX_KINDS if INDEX_KINDS[kind].needs_build}
    assert set(SAVED_KINDS) == with_build - {"auto"}


@pytest.mark.parametrize("kind", SAVED_KINDS)
def test_an_index_that_was_read_back_answers_as_the_one_that_was_written(
    folder: Path, kind: str
) -> None:
    loaded = read(file_of(folder, kind), kind)
    assert loaded.kind == kind
    assert loaded.index_bytes == built(kind).index_bytes
    assert_same_answers(loaded, built(kind))


@pytest.mark.parametrize("kind", SAVED_KINDS)
def test_a_file_cut_at_or_beside_the_edge_of_any_section_is_refused(
    folder: Path, kind: str
) -> None:
    whole = file_of(folder, kind).read_bytes()
    cut = folder / f"{kind}-cut.index"
    places = {edge + beside for edge in sections(whole) for beside in (-1, 0, 1)}
    for length in sorted(place for place in places if 0 <= place < len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(FailedPrecondition, match=r"cut\.index"):
            read(cut, kind)
    cut.write_bytes(whole + b"\0")
    with pytest.raises(FailedPrecondition, match=r"cut\.index"):
        read(cut, kind)


@pytest.mark.parametrize("kind", SAVED_KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_changed_bytes_are_refused_or_had_no_meaning(
    folder: Path, kind: str, data: st.DataObject
) -> None:
    whole = file_of(folder, kind).read_bytes()
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    # Half of the changes go to the header, which is a small part of the file.
    place = st.integers(0, header_end - 1) | st.integers(0, len(whole) - 1)
    damaged = bytearray(whole)
    changes = data.draw(st.lists(st.tuples(place, st.integers(1, 255)), min_size=1, max_size=4))
    for at, bits in changes:
        damaged[at] ^= bits
    path = folder / f"{kind}-damaged.index"
    path.write_bytes(damaged)
    try:
        loaded = read(path, kind)
    except FailedPrecondition:
        return
    assert_same_answers(loaded, built(kind))


@pytest.mark.parametrize("kind", SAVED_KINDS)
def test_an_index_of_other_keys_or_another_shard_is_refused(folder: Path, kind: str) -> None:
    path = file_of(folder, kind)
    with pytest.raises(FailedPrecondition, match="keys_crc32") as raised:
        read_index(path, layer_kv(seed=1), kind, BINDING)
    assert raised.value.reason == OTHER
    with pytest.raises(FailedPrecondition, match="shard_crc32") as raised:
        read_index(path, layer_kv(), kind, BINDING | {"shard_crc32": "99999999"})
    assert raised.value.reason == OTHER


@pytest.mark.parametrize("kind", SAVED_KINDS)
def test_an_index_of_another_version_is_refused(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file_of(folder, kind)
    monkeypatch.setattr(INDEX_KINDS[kind], "format_version", 99)
    with pytest.raises(FailedPrecondition, match="version is '1' and '99'") as raised:
        read(path, kind)
    assert raised.value.reason == OTHER


def test_an_index_is_loaded_for_its_own_kind_and_for_the_kind_that_chose_it(
    tmp_path: Path,
) -> None:
    write_index(tmp_path / "a.index", built("sketch"), layer_kv(), "auto", BINDING)
    for target in ("auto", "sketch"):
        assert read(tmp_path / "a.index", target).kind == "sketch"
    with pytest.raises(FailedPrecondition, match="'roargraph' is needed"):
        read(tmp_path / "a.index", "roargraph")


@pytest.mark.parametrize("kind", SAVED_KINDS)
def test_sound_arrays_of_another_shape_of_keys_are_refused(kind: str) -> None:
    kv = layer_kv()
    fewer = LayerKv(kv.keys[:, :-70], kv.values[:, :-70], kv.start)
    with pytest.raises((ValueError, KeyError)):
        INDEX_KINDS[kind].restore(fewer, built(kind).arrays())


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="build the index again"):
        read(tmp_path / "nothing.index", "sketch")


# The life of an index on a node.

GEOMETRY = (LayerGeometry(0, 4, 2, 16, 8), LayerGeometry(1, 4, 2, 16, 8))


def filled_store(directory: Path, kind: str, sequence: Sequence) -> Store:
    """A store whose one shard has its indexes, both on disk."""
    store = make_store(kind=kind, snapshot_dir=directory)
    capability = write_capability()
    with store.put(
        "ctx-test", sequence.shard(), sequence.identity, sequence.geometry, capability
    ) as stream:
        stream.write(sequence.block(0, sequence.tokens))
        queries = np.random.default_rng(2).normal(size=(4, 40, 16)).astype(np.float32)
        for layer in sequence.layers:
            stream.add_sample(QuerySample(layer, 0, np.arange(40), queries))
    store.seal("ctx-test", sequence.shard().shard_id, capability, sequence.token_ids)
    settle(store)
    return store


def settle(store: Store) -> None:
    assert store._builder.wait_idle(60)
    assert store._snapshots is not None
    assert store._snapshots.wait_idle(60)


def answers(store: Store, sequence: Sequence) -> list[np.ndarray]:
    handle, _ = open_session(store, sequence, sequence.tokens)
    rows = rows_for(handle, Span(0, sequence.tokens), budget=ROWS.budget, geometry=GEOMETRY[0])
    results = [store.attend(layer, [rows], SCALE, 0.0).results[0] for layer in (0, 1)]
    return [each.partial.output for each in results]


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kinds that were built, one entry for each layer."""
    seen: list[str] = []
    for kind in SAVED_KINDS:
        original = INDEX_KINDS[kind].build.__func__

        def build(cls, kv, sample, control, original=original):
            seen.append(cls.kind)
            return original(cls, kv, sample, control)

        monkeypatch.setattr(INDEX_KINDS[kind], "build", classmethod(build))
    return seen


@pytest.mark.parametrize("kind", [*SAVED_KINDS, "auto"])
def test_a_restarted_node_serves_its_indexes_without_building_them_again(
    tmp_path: Path, kind: str, builds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "EXACT_BELOW", 100)
    sequence = Sequence(400, geometry=GEOMETRY)
    first = filled_store(tmp_path, kind, sequence)
    assert len(builds) == 2
    second = make_store(kind=kind, snapshot_dir=tmp_path)
    assert second.load_snapshots() == 1
    assert len(builds) == 2
    before, after = (store.inventory()[0][0].index for store in (first, second))
    assert (after.serving_kind, after.target_kind) == (before.serving_kind, before.target_kind)
    assert (after.built, after.total, after.bytes) == (4, 4, before.bytes)
    assert second.stats().index_bytes >= after.bytes
    for one, other in zip(answers(first, sequence), answers(second, sequence), strict=True):
        np.testing.assert_array_equal(one, other)
    second.drop("ctx-test", write_capability())
    assert second.stats().index_bytes == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "changed", "swapped", "version"])
def test_an_index_file_that_cannot_be_used_is_built_again_and_replaced(
    tmp_path: Path,
    damage: str,
    builds: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sequence = Sequence(400, geometry=GEOMETRY)
    first = filled_store(tmp_path, "sketch", sequence)
    one, other = sorted(tmp_path.glob("*.index"))
    whole = one.read_bytes()
    if damage == "missing":
        one.unlink()
    elif damage == "empty":
        one.write_bytes(b"")
    elif damage == "cut":
        one.write_bytes(whole[: len(whole) // 2])
    elif damage == "changed":
        one.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    elif damage == "swapped":
        one.write_bytes(other.read_bytes())
    else:
        monkeypatch.setattr(INDEX_KINDS["sketch"], "format_version", 2)
    second = make_store(kind="sketch", snapshot_dir=tmp_path)
    with caplog.at_level(logging.WARNING):
        assert second.load_snapshots() == 1
    settle(second)
    rebuilt = 2 if damage == "version" else 1
    assert len(builds) == 2 + rebuilt
    told = [each for each in caplog.messages if "is not used" in each]
    assert len(told) == (0 if damage == "missing" else rebuilt)
    assert second.inventory()[0][0].index.serving_kind == "sketch"
    for a, b in zip(answers(first, sequence), answers(second, sequence), strict=True):
        np.testing.assert_array_equal(a, b)
    third = make_store(kind="sketch", snapshot_dir=tmp_path)
    third.load_snapshots()
    assert len(builds) == 2 + rebuilt


def test_an_index_that_does_not_fit_into_memory_is_not_loaded(tmp_path: Path) -> None:
    sequence = Sequence(400, geometry=GEOMETRY)
    first = filled_store(tmp_path, "hnsw", sequence)
    shard_and_samples = first.stats().context_bytes + 2 * 40 * (4 * 16 * 4 + 8)
    second = make_store(limit_bytes=shard_and_samples + 1000, kind="hnsw", snapshot_dir=tmp_path)
    assert second.load_snapshots() == 1
    settle(second)
    status = second.inventory()[0][0].index
    assert status.serving_kind == "flat"
    assert "--memory-limit-bytes" in status.error


def test_indexes_whose_shard_is_gone_are_removed_at_start(tmp_path: Path) -> None:
    filled_store(tmp_path, "sketch", Sequence(400, geometry=GEOMETRY))
    (shard,) = tmp_path.glob("*.safetensors")
    shard.unlink()
    assert len(list(tmp_path.glob("*.index"))) == 2
    assert make_store(kind="sketch", snapshot_dir=tmp_path).load_snapshots() == 0
    assert list(tmp_path.iterdir()) == []


def test_another_kind_than_the_files_is_built(tmp_path: Path, builds: list[str]) -> None:
    filled_store(tmp_path, "sketch", Sequence(400, geometry=GEOMETRY))
    second = make_store(kind="kmeans", snapshot_dir=tmp_path)
    assert second.load_snapshots() == 1
    settle(second)
    assert builds == ["sketch"] * 2 + ["kmeans"] * 2
    assert second.inventory()[0][0].index.serving_kind == "kmeans"
