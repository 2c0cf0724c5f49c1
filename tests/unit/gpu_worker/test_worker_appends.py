"""New KV leaves for every node of a tail and is sent again until all of them have it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from gpu_worker.appends import Appends, LayerKv, NewTokens
from gpu_worker.asks import NodeSession
from gpu_worker.routes import plan_route
from longreach.errors import (
    FailedPrecondition,
    Internal,
    LongreachError,
    NotFound,
    StaleEpoch,
    Unavailable,
)
from longreach.types import AppendEntry, LayerGeometry, Shard, ShardMap, Span

LAYERS = (LayerGeometry(0, 4, 2, 8, 8), LayerGeometry(1, 4, 2, 8, 8), LayerGeometry(2, 4, 2, 8, 6))
START = 100
RNG = np.random.default_rng(0)
KV: LayerKv = [
    (
        RNG.normal(size=(2, 60, g.head_dim)).astype(np.float32),
        RNG.normal(size=(2, 60, g.value_dim)).astype(np.float32),
    )
    for g in LAYERS
]


def window(span: Span) -> LayerKv:
    rows = slice(span.start - START, span.stop - START)
    return [(keys[:, rows], values[:, rows]) for keys, values in KV]


class Stream:
    """An append stream whose answers the test gives by hand."""

    def __init__(self, on_ack: Callable[[int, int, LongreachError | None], None]) -> None:
        self.on_ack = on_ack
        self.messages: list[list[AppendEntry]] = []

    def submit(self, entries: Sequence[AppendEntry]) -> None:
        self.messages.append(list(entries))

    def close(self) -> None:
        pass

    def acknowledge(self) -> None:
        """Answers the last message."""
        for entry in self.messages[-1]:
            self.on_ack(entry.handle, entry.start + len(entry.token_ids), None)

    def refuse(self, error: LongreachError) -> None:
        for entry in self.messages[-1]:
            self.on_ack(entry.handle, entry.start, error)


class Writer:
    """Appends with streams by hand, one session "s" on the given shards."""

    def __init__(self, *shards: Shard) -> None:
        self.streams: dict[str, Stream] = {}
        self.appends = Appends(LAYERS, self._open)
        nodes = {name for shard in shards for name in shard.node_ids}
        route = plan_route(ShardMap(shards, {n: n for n in nodes}, "test"), LAYERS, START)
        self.session = NodeSession(route, {name: i + 1 for i, name in enumerate(sorted(nodes))})
        self.appends.open("s", 7, self.session, START)
        self.length = START

    def _open(self, address: str, on_ack: Callable[..., None]) -> Stream:
        self.streams[address] = Stream(on_ack)
        return self.streams[address]

    def add(self, count: int = 1) -> None:
        span = Span(self.length, self.length + count)
        ids = tuple(range(span.start, span.stop))
        new = NewTokens("s", span.start, ids, window(span), slice(None))
        self.appends.submit([new])
        self.length = span.stop

    def require(self, stop: int, timeout_s: float = 1.0) -> None:
        self.appends.require("s", stop, self.length, window, timeout_s)

    @property
    def acknowledged(self) -> int:
        return self.appends.acknowledged("s")


def everything(*nodes: str) -> Shard:
    return Shard("all", Span(0, START), (0, 1, 2), 0, 2, nodes)


def test_each_node_gets_its_layers_and_heads_in_blocks_of_equal_shape() -> None:
    writer = Writer(
        Shard("a", Span(0, START), (0, 1, 2), 0, 1, ("n0",)),
        Shard("b", Span(0, START), (0, 1, 2), 1, 2, ("n1",)),
    )
    writer.add(3)
    for number, name in enumerate(("n0", "n1")):
        ((entry,),) = writer.streams[name].messages
        assert (entry.epoch, entry.start, entry.token_ids) == (7, 100, (100, 101, 102))
        assert [block.layers for block in entry.blocks] == [(0, 1), (2,)]
        for block in entry.blocks:
            assert block.kv_head_start == number
            for axis, layer in enumerate(block.layers):
                assert np.array_equal(block.keys[axis], KV[layer][0][[number], :3])
                assert np.array_equal(block.values[axis], KV[layer][1][[number], :3])


def test_a_step_of_many_sessions_is_one_message_per_node() -> None:
    writer = Writer(everything("n0"))
    other = NodeSession(writer.session.route, {"n0": 99})
    writer.appends.open("t", 1, other, START)
    news = [
        NewTokens(name, START, (5, 6), KV, slice(at, at + 2)) for name, at in (("s", 0), ("t", 2))
    ]
    writer.appends.submit(news)
    ((first, second),) = writer.streams["n0"].messages
    assert [first.handle, second.handle] == [1, 99]
    assert np.array_equal(second.blocks[0].keys[0], KV[0][0][:, 2:4])


def test_a_position_counts_when_every_node_has_it() -> None:
    writer = Writer(everything("n0", "n1"))
    writer.add(5)
    writer.streams["n0"].acknowledge()
    assert writer.acknowledged == START
    writer.streams["n1"].acknowledge()
    assert writer.acknowledged == START + 5
    writer.require(START + 5)


def test_require_waits_for_a_late_acknowledgement() -> None:
    writer = Writer(everything("n0"))
    writer.add()
    timer = threading.Timer(0.05, writer.streams["n0"].acknowledge)
    timer.start()
    writer.require(START + 1, timeout_s=5)
    timer.join()
    assert writer.acknowledged == START + 1


def test_require_gives_up_clearly() -> None:
    writer = Writer(everything("n0"))
    writer.add()
    with pytest.raises(Unavailable, match="up to 100, the step needs 101") as refusal:
        writer.require(START + 1, timeout_s=0.05)
    assert refusal.value.reason == "TAIL_NOT_STORED"


@pytest.mark.parametrize(
    "error", [Unavailable("n0 restarts"), FailedPrecondition("a gap", reason="APPEND_GAP")]
)
def test_what_a_node_missed_is_sent_again_in_one_piece(error: LongreachError) -> None:
    writer = Writer(everything("n0"))
    stream = None
    writer.add(2)
    stream = writer.streams["n0"]
    stream.acknowledge()
    for _ in range(3):
        writer.add()
        stream.refuse(error)

    def node_is_back() -> None:
        while len(stream.messages) < 3:
            pass
        stream.acknowledge()

    back = threading.Thread(target=node_is_back)
    back.start()
    writer.require(START + 5, timeout_s=5)
    back.join()
    (entry,) = stream.messages[-1]
    assert (entry.start, entry.token_ids) == (START + 2, (102, 103, 104))
    assert np.array_equal(entry.blocks[0].keys[1], KV[1][0][:, 2:5])


def test_a_node_with_a_replica_is_left_behind() -> None:
    writer = Writer(everything("n0", "n1"))
    writer.add()
    writer.streams["n0"].refuse(Unavailable("n0 is gone"))
    writer.streams["n1"].acknowledge()
    writer.require(START + 1)
    assert writer.session.lost == {"n0"}
    writer.add()
    assert len(writer.streams["n0"].messages) == 1
    assert len(writer.streams["n1"].messages) == 2


def test_a_node_that_hangs_is_left_behind_when_the_time_runs_out() -> None:
    writer = Writer(everything("n0", "n1"))
    writer.add(2)
    writer.streams["n1"].acknowledge()
    writer.require(START, timeout_s=0.05)
    assert not writer.session.lost
    writer.require(START + 2, timeout_s=0.05)
    assert writer.session.lost == {"n0"}
    assert writer.acknowledged == START + 2


def test_the_last_holder_is_never_left_behind() -> None:
    writer = Writer(everything("n0", "n1"))
    writer.add()
    writer.streams["n0"].refuse(Unavailable("n0 is gone"))
    writer.streams["n1"].refuse(Unavailable("n1 is gone"))
    with pytest.raises(Unavailable):
        writer.require(START + 1, timeout_s=0.3)
    assert len(writer.session.lost) == 1


@pytest.mark.parametrize(
    "error", [NotFound("no such handle"), Internal("broken"), StaleEpoch("newer writer")]
)
def test_what_can_never_be_stored_is_raised(error: LongreachError) -> None:
    writer = Writer(everything("n0"))
    writer.add()
    writer.streams["n0"].refuse(error)
    with pytest.raises(type(error)):
        writer.require(START)


def test_a_newer_writer_fences_off_even_where_there_are_replicas() -> None:
    writer = Writer(everything("n0", "n1"))
    writer.add()
    writer.streams["n0"].refuse(StaleEpoch("newer writer"))
    with pytest.raises(StaleEpoch):
        writer.require(START)


def test_answers_for_a_closed_session_are_ignored() -> None:
    writer = Writer(everything("n0"))
    writer.add()
    writer.appends.close_session("s")
    writer.streams["n0"].acknowledge()
    writer.appends.open("s", 8, writer.session, START)
    assert writer.acknowledged == START
