"""Earlier KV from the nodes: every layer in order, whole, whichever holder answers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from gpu_worker.earlier import EarlierKv
from gpu_worker.offload import Destination
from longreach.errors import Cancelled, InvalidRequest, Unavailable
from longreach.types import (
    Identity,
    KvBlock,
    LayerGeometry,
    QuerySample,
    Shard,
    ShardEnd,
    ShardHeader,
    ShardMap,
    ShardPart,
    Span,
)

LAYERS = tuple(LayerGeometry(i, 4, 2, 8, 6) for i in range(3))
IDENTITY = Identity("m", "r", "float32")
RNG = np.random.default_rng(5)
KEYS = RNG.normal(size=(3, 2, 300, 8)).astype(np.float32)
VALUES = RNG.normal(size=(3, 2, 300, 6)).astype(np.float32)
SHARDS = (
    Shard("a", Span(0, 100), (0, 2), 0, 2, ("n0", "n1")),
    Shard("b", Span(0, 100), (1,), 0, 1, ("n1",)),
    Shard("c", Span(0, 100), (1,), 1, 2, ("n0",)),
    Shard("d", Span(100, 200), (0, 1, 2), 0, 2, ("n1", "n0")),
    Shard("e", Span(200, 300), (0, 1, 2), 0, 2, ("n2",)),
)
OF = Destination(
    "ctx", IDENTITY, ShardMap(SHARDS, {n: n for n in ("n0", "n1", "n2")}, "span"), b"",
    frozenset("e"), b"leave",
)  # fmt: skip


class Node:
    """Streams shards in blocks of 40 positions; fails after so many blocks."""

    def __init__(self, fails_after: int | None = None, drops: tuple[int, int] = (-1, -1)) -> None:
        self._left = fails_after
        self._drops = drops

    def read_shard(
        self, context_id: str, shard_id: str, capability: bytes, layer: int, start: int
    ) -> Iterator[ShardPart]:
        assert (context_id, capability, start) == ("ctx", b"leave", 0)
        shard = next(each for each in SHARDS if each.shard_id == shard_id)
        heads = slice(shard.kv_head_start, shard.kv_head_stop)
        yield ShardHeader("ctx", shard, IDENTITY, LAYERS)
        yield QuerySample(0, 0, np.arange(1, dtype=np.int64), np.zeros((4, 1, 8), np.float32))
        for number in (each for each in shard.layers if each >= layer):
            for at in range(shard.span.start, shard.span.stop, 40):
                rows = slice(at, min(at + 40, shard.span.stop))
                if self._left is not None:
                    if not self._left:
                        raise Unavailable("the node died")
                    self._left -= 1
                if (number, at) != self._drops:
                    yield KvBlock(
                        (number,), heads.start, at,
                        KEYS[number, None, heads, rows], VALUES[number, None, heads, rows],
                    )  # fmt: skip
        yield ShardEnd(np.zeros(len(shard.span), np.int32), 0)

    def close(self) -> None:
        pass


def read(nodes: dict[str, Node]) -> None:
    earlier = EarlierKv(OF, LAYERS, 200, nodes.__getitem__)
    try:
        for layer in range(3):
            keys, values = earlier.take(layer, lambda: None)
            np.testing.assert_array_equal(keys, KEYS[layer][:, :200])
            np.testing.assert_array_equal(values, VALUES[layer][:, :200])
    finally:
        earlier.close()


def test_every_layer_comes_whole_from_shards_of_any_form() -> None:
    read({"n0": Node(), "n1": Node()})


@pytest.mark.parametrize("blocks", [0, 1, 4, 5])
def test_another_holder_goes_on_where_one_is_lost(blocks: int) -> None:
    # Shards "a" and "d" have another holder; "b" is on n1 alone and read as layer 1.
    clients = [Node(fails_after=blocks)]

    def connect(address: str) -> Node:
        return clients.pop() if address == "n0" and clients else Node()

    earlier = EarlierKv(OF, LAYERS, 200, connect)
    keys = [earlier.take(layer, lambda: None)[0] for layer in range(3)]
    earlier.close()
    np.testing.assert_array_equal(np.stack(keys), KEYS[:, :, :200])


def test_a_shard_without_a_holder_that_answers_and_a_hole_are_errors() -> None:
    with pytest.raises(Unavailable, match="died"):
        read({"n0": Node(fails_after=3), "n1": Node(fails_after=3)})
    with pytest.raises(Unavailable, match="position 40 of layer 1, KV head 0"):
        read({"n0": Node(), "n1": Node(drops=(1, 40))})


def test_giving_up_ends_the_wait_and_the_thread() -> None:
    class Stuck(Node):
        def read_shard(self, *args: object) -> Iterator[ShardPart]:  # type: ignore[override]
            threads.append(1)
            while not released:
                yield QuerySample(0, 0, np.arange(0), np.zeros((4, 0, 8), np.float32))

        def close(self) -> None:
            released.append(1)

    threads: list[int] = []
    released: list[int] = []

    def give_up() -> None:
        raise Cancelled("enough")

    earlier = EarlierKv(OF, LAYERS, 200, lambda address: Stuck())
    with pytest.raises(Cancelled, match="enough"):
        earlier.take(0, give_up)
    released.append(1)
    earlier.close()


def test_a_shard_to_compute_must_be_in_the_map() -> None:
    assert (OF.start, [shard.shard_id for shard in OF.shards]) == (200, ["e"])
    wrong = Destination("ctx", IDENTITY, OF.shard_map, b"", frozenset(("e", "x")))
    with pytest.raises(InvalidRequest, match="'x'"):
        _ = wrong.shards
