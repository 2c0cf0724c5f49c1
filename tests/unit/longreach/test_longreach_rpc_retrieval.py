"""NodeClient and AsyncNodeClient against a tiny node over real gRPC."""

import socket

import numpy as np
import pytest
from rpc_servers import echo_response, rows_of, serving

from longreach import wire
from longreach.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    IdentityMismatch,
    Internal,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from longreach.rpc.retrieval import AsyncNodeClient, NodeClient, split_block
from longreach.rpc.status import map_errors
from longreach.types import (
    Identity,
    IndexStatus,
    KvBlock,
    LayerGeometry,
    NodeStats,
    QuerySample,
    SessionInventory,
    SessionRecord,
    Shard,
    ShardInventory,
    Span,
    WorkFigures,
)
from longreach.v1 import retrieval_pb2 as pb
from longreach.v1.retrieval_pb2_grpc import (
    RetrievalServiceServicer,
    add_RetrievalServiceServicer_to_server,
)

IDENTITY = Identity("m", "r", "float16", tenant="t")
SHARD = Shard("s-0", Span(0, 64), (0, 1), 0, 2, ("n1",))
GEOMETRY = (LayerGeometry(0, 4, 2, 8, 8), LayerGeometry(1, 4, 2, 8, 8))
RECORD = SessionRecord("s-1", "ctx-1", 64, "t", 3)
SESSIONS = [SessionInventory("s-1", "c-0", 3), SessionInventory("s-2", "c-1", 1)]
STATS = NodeStats(1, 2, 3, 4, 5, 6, 7, WorkFigures(8), "avx2")
INVENTORY = ShardInventory(
    "ctx-1", SHARD, IDENTITY, True, 77, 4096, IndexStatus("flat", "graph", 1, 2, 3), False
)


def block(start=0, positions=64, dim=8):
    rng = np.random.default_rng(start)
    keys = rng.standard_normal((2, 2, positions, dim)).astype(np.float16)
    return KvBlock((0, 1), 0, start, keys, -keys)


class Node(RetrievalServiceServicer):
    """Remembers what it was sent."""

    def __init__(self):
        self.put = []
        self.asked = None
        self.reads_cancelled = 0

    @map_errors
    def Put(self, request_iterator, context):
        self.put.extend(request_iterator)
        if self.put[0].header.context_id == "full":
            raise ResourceExhausted("no memory for context 'full'", retry_after_s=2.5)
        return pb.PutResponse(bytes_stored=sum(part.ByteSize() for part in self.put))

    @map_errors
    def Seal(self, request, context):
        self.asked = request
        if request.shard_id == "gap":
            raise FailedPrecondition("positions [3, 5) are missing", reason="SHARD_INCOMPLETE")
        return pb.SealResponse(checksum=2**32 - 1, bytes_stored=4096)

    @map_errors
    def OpenSession(self, request, context):
        self.asked = request
        if wire.identity_from_proto(request.identity) != IDENTITY:
            raise IdentityMismatch("model 'other' != 'm'")
        return pb.OpenSessionResponse(handle=2**64 - 1, stop=64)

    @map_errors
    def CloseSession(self, request, context):
        if request.handle != 5:
            raise NotFound(f"no session {request.handle}", reason="UNKNOWN_HANDLE")
        return pb.CloseSessionResponse(bytes_freed=123)

    @map_errors
    def Read(self, request, context):
        self.asked = request
        try:
            for start in range(request.span.start, request.span.stop, 16):
                yield pb.ReadResponse(block=wire.kv_block_to_proto(block(start, 16)))
            if request.handle == 6:
                raise NotFound("positions [64, 80) are gone")
        finally:
            self.reads_cancelled += not context.is_active()

    @map_errors
    def AttendOnce(self, request, context):
        return pb.AttendOnceResponse(attend=echo_response(request.attend))

    @map_errors
    def Drop(self, request, context):
        self.asked = request
        if request.context_id == "broken":
            raise RuntimeError("secret internals")
        return pb.DropResponse(bytes_freed=456)

    @map_errors
    def Inventory(self, request, context):
        self.asked = request
        return pb.InventoryResponse(
            shards=[wire.shard_inventory_to_proto(INVENTORY)],
            sessions=[wire.session_inventory_to_proto(each) for each in SESSIONS],
        )

    @map_errors
    def Stats(self, request, context):
        return wire.node_stats_to_proto(STATS)


@pytest.fixture
def node():
    servicer = Node()
    with serving(add_RetrievalServiceServicer_to_server, servicer) as (address, _):
        servicer.address = address
        yield servicer


@pytest.fixture
def client(node):
    client = NodeClient(node.address)
    yield client
    client.close()


def put(client, parts, context_id="ctx-1"):
    return client.put(context_id, SHARD, IDENTITY, GEOMETRY, b"cap", parts)


def test_put_streams_the_header_first_then_every_part(client, node):
    sample = QuerySample(0, 0, np.arange(3), np.ones((4, 3, 8), np.float16))
    stored = put(client, [block(0, 32), sample, block(32, 32)])
    assert stored == sum(part.ByteSize() for part in node.put)
    header, first, second, third = node.put
    assert header.header.capability == b"cap"
    assert wire.shard_from_proto(header.header.shard) == SHARD
    assert wire.identity_from_proto(header.header.identity) == IDENTITY
    assert [wire.geometry_from_proto(each) for each in header.header.layers] == list(GEOMETRY)
    np.testing.assert_array_equal(wire.kv_block_from_proto(first.block).keys, block(0, 32).keys)
    np.testing.assert_array_equal(
        wire.query_sample_from_proto(second.sample).positions, sample.positions
    )
    assert third.block.start == 32


def test_put_raises_what_the_node_raised_with_its_retry_hint(client):
    with pytest.raises(ResourceExhausted, match="no memory") as caught:
        put(client, [block()], context_id="full")
    assert caught.value.retry_after_s == 2.5


def test_put_raises_what_its_parts_raised(client):
    def parts():
        yield block()
        raise ValueError("the model was unloaded")

    with pytest.raises(ValueError, match="the model was unloaded"):
        put(client, parts())


def test_long_blocks_are_put_in_parts_that_join_to_the_whole(client, node):
    whole = block(128, 1 << 14, dim=80)
    assert whole.keys.nbytes + whole.values.nbytes > 8 << 20
    put(client, [whole])
    parts = [wire.kv_block_from_proto(part.block) for part in node.put[1:]]
    assert len(parts) > 1
    assert [part.start for part in parts[1:]] == [part.span.stop for part in parts[:-1]]
    np.testing.assert_array_equal(np.concatenate([p.keys for p in parts], axis=2), whole.keys)
    np.testing.assert_array_equal(np.concatenate([p.values for p in parts], axis=2), whole.values)


def test_a_block_is_split_by_positions_and_at_least_one_at_a_time():
    parts = list(split_block(block(64, 10), part_bytes=1))
    assert [part.span for part in parts] == [Span(p, p + 1) for p in range(64, 74)]
    assert [part.span for part in split_block(block(0, 10), 10**9)] == [Span(0, 10)]
    assert list(split_block(block(0, 0), 100)) == []


def test_seal_sends_the_token_ids_and_returns_the_checksum(client, node):
    assert client.seal("ctx-1", "s-0", b"cap", range(5, 69)) == (2**32 - 1, 4096)
    ids = wire.tensor_from_proto(node.asked.token_ids, name="ids", shape=(64,), dtype=np.int32)
    assert ids.tolist() == list(range(5, 69))
    with pytest.raises(FailedPrecondition, match=r"\[3, 5\)") as caught:
        client.seal("ctx-1", "gap", b"cap", [])
    assert caught.value.reason == "SHARD_INCOMPLETE"


def test_open_session_returns_the_handle_and_where_the_tail_stands(client, node):
    assert client.open_session(b"cap", RECORD, IDENTITY, [SHARD], GEOMETRY) == (2**64 - 1, 64)
    assert wire.session_record_from_proto(node.asked.record) == RECORD
    assert [wire.shard_from_proto(shard) for shard in node.asked.tail_shards] == [SHARD]
    with pytest.raises(IdentityMismatch, match="'other' != 'm'"):
        client.open_session(b"cap", RECORD, Identity("other", "r", "float16"), [], [])


def test_close_session_returns_the_bytes_freed_or_names_the_unknown_handle(client):
    assert client.close_session(5) == 123
    with pytest.raises(NotFound, match="no session 9") as caught:
        client.close_session(9)
    assert caught.value.reason == "UNKNOWN_HANDLE"


def test_read_yields_blocks_as_they_come(client, node):
    blocks = list(client.read(5, Span(16, 64), layers=(0, 1)))
    assert [each.span for each in blocks] == [Span(16, 32), Span(32, 48), Span(48, 64)]
    np.testing.assert_array_equal(blocks[1].values, block(32, 16).values)
    assert list(node.asked.layers) == [0, 1]


def test_read_raises_after_the_blocks_that_came(client):
    spans = []
    with pytest.raises(NotFound, match="are gone"):
        spans.extend(each.span for each in client.read(6, Span(0, 32)))
    assert len(client.inventory()[0]) == 1


def test_closing_a_read_cancels_it_on_the_node(client, node):
    reading = client.read(5, Span(0, 16 * 100_000))
    assert next(reading).start == 0
    reading.close()
    client.stats()
    for _ in range(200):
        if node.reads_cancelled:
            break
        client.stats()
    assert node.reads_cancelled == 1


def test_attend_once_answers_rows_outside_any_stream(client):
    first, second = client.attend_once(3, [rows_of(1.5), rows_of(2.5, count=3)], 1.0)
    assert (first.partial.lse == 1.5).all()
    assert second.partial.output.shape == (3, 4, 8)
    assert (second.partial.output == 5.0).all()


def test_drop_inventory_and_stats(client, node):
    assert client.drop("ctx-1", b"cap") == 456
    assert node.asked.capability == b"cap"
    assert client.inventory("ctx-1") == ([INVENTORY], SESSIONS)
    assert node.asked.context_id == "ctx-1"
    assert client.stats() == STATS


def test_a_bug_in_the_node_is_internal_and_keeps_its_text_to_itself(client, caplog):
    with pytest.raises(Internal, match="Drop failed with RuntimeError") as caught:
        client.drop("broken", b"")
    assert "secret internals" not in str(caught.value)
    assert "secret internals" in caplog.text


async def test_the_coordinators_client_does_the_same_without_blocking(node):
    client = AsyncNodeClient(node.address)
    assert await client.drop("ctx-1", b"cap") == 456
    assert await client.inventory() == ([INVENTORY], SESSIONS)
    assert await client.stats() == STATS
    with pytest.raises(Internal, match="RuntimeError"):
        await client.drop("broken", b"")
    await client.close()


async def test_nobody_at_the_address_is_unavailable_and_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    blocking, waiting = NodeClient(address), AsyncNodeClient(address)
    with pytest.raises(Unavailable, match=address):
        blocking.stats()
    with pytest.raises(Unavailable, match=address):
        list(blocking.read(1, Span(0, 1)))
    with pytest.raises(Unavailable, match=address):
        await waiting.stats()
    blocking.close()
    await waiting.close()


async def test_a_peer_that_accepts_but_never_answers_runs_into_the_deadline():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        blocking = NodeClient(address, timeout_s=0.2)
        with pytest.raises((DeadlineExceeded, Unavailable)):
            blocking.stats()
        blocking.close()
