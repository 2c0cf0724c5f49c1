"""WorkerClient against a tiny worker over real gRPC: steps, prefill, sessions."""

import asyncio

import grpc
import pytest

from longreach import wire
from longreach.errors import InvalidRequest, NotFound, ResourceExhausted, Unavailable
from longreach.rpc.channels import server_options
from longreach.rpc.status import map_errors
from longreach.rpc.worker import WorkerClient
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
from longreach.types import Budget, Identity, LayerGeometry, SessionRecord, ShardMap
from longreach.v1 import worker_pb2 as pb
from longreach.v1.worker_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server

IDENTITY = Identity("m", "r", "float32", tenant="t")
MAP = ShardMap((), {"n1": "127.0.0.1:1"}, "layer", "because")
RECORD = SessionRecord("s-1", "ctx-1", 64, "t", 3)
STATUS = WorkerStatus(
    ModelInfo("m", "r", IDENTITY, (LayerGeometry(0, 4, 2, 8, 8),), 4096, 320, "/models/m", (2,)),
    "cpu",
    *range(1, 9),
)
BOUNDED_S = 10


class Worker(WorkerServiceServicer):
    """Draws token position + 1; the aio form of a worker's server."""

    def __init__(self):
        self.asked = None
        self.cancelled = asyncio.Event()
        self.step_streams = 0

    @map_errors
    async def Prefill(self, request, context):
        self.asked = request
        if not request.token_ids:
            raise InvalidRequest("a context has at least one token")
        try:
            for layer in range(1, len(request.token_ids)):
                progress = PrefillProgress(layer, 9, 5, 5, layer / 8)
                yield wire.prefill_progress_to_proto(progress)
                await asyncio.sleep(0.01)
            summary = PrefillSummary(1.5, 2.5, 4096, 0, {"s-0": 7})
            yield wire.prefill_progress_to_proto(PrefillProgress(9, 9, 5, 5, 1.0, summary))
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    @map_errors
    async def OpenSession(self, request, context):
        self.asked = request
        if request.record.session_id == "full":
            raise ResourceExhausted("16 sessions are open; the limit is 16", retry_after_s=1.0)
        return pb.WorkerServiceOpenSessionResponse(stop=64, resident_bytes=4096)

    @map_errors
    async def CloseSession(self, request, context):
        self.asked = request
        return pb.WorkerServiceCloseSessionResponse(closed=request.session_id == "s-1")

    @map_errors
    async def Step(self, request_iterator, context):
        self.step_streams += 1
        async for request in request_iterator:
            rows = [wire.step_row_from_proto(row) for row in request.rows]
            if any(row.session_id == "poison" for row in rows):
                raise NotFound("no session 'poison'")
            results = tuple(StepRowResult(row.session_id, row.position + 1) for row in rows)
            outcome = StepOutcome(results, StepTiming(total_s=0.002))
            yield wire.step_outcome_to_proto(outcome, request.step_id)

    @map_errors
    async def Status(self, request, context):
        return wire.worker_status_to_proto(STATUS)


@pytest.fixture
async def worker():
    servicer = Worker()
    server = grpc.aio.server(options=server_options())
    add_WorkerServiceServicer_to_server(servicer, server)
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    servicer.server = server
    await server.start()
    yield servicer
    await server.stop(None)


@pytest.fixture
async def client(worker):
    client = WorkerClient(worker.address)
    yield client
    await client.close()


def row(session_id="s-1", position=64):
    return StepRow(session_id, position, (5,), True)


async def test_a_step_gives_results_in_the_order_of_its_rows(client):
    outcome = await client.step([row("a", 5), row("b", 7)])
    assert outcome == StepOutcome(
        (StepRowResult("a", 6), StepRowResult("b", 8)), StepTiming(total_s=0.002)
    )


async def test_all_steps_share_one_stream_even_when_sent_together(client, worker):
    outcomes = await asyncio.gather(*(client.step([row(position=p)]) for p in range(30)))
    assert [outcome.results[0].token_id for outcome in outcomes] == list(range(1, 31))
    assert worker.step_streams == 1


async def test_a_step_stream_that_ended_in_an_error_is_opened_again(client, worker):
    with pytest.raises(NotFound, match="poison"):
        await client.step([row("poison")])
    assert (await client.step([row()])).results[0].token_id == 65
    assert worker.step_streams == 2


async def test_a_worker_that_is_gone_is_unavailable(client, worker):
    await client.step([row()])
    await worker.server.stop(None)
    async with asyncio.timeout(BOUNDED_S):
        with pytest.raises(Unavailable, match=worker.address):
            await client.step([row()])
        with pytest.raises(Unavailable, match=worker.address):
            await client.status()


async def test_prefill_yields_progress_and_ends_with_a_summary(client, worker):
    seen = [
        progress
        async for progress in client.prefill("ctx-1", [3, 1, 4], IDENTITY, MAP, b"capability")
    ]
    assert [progress.layers_done for progress in seen] == [1, 2, 9]
    assert seen[0].summary is None
    assert seen[-1].summary == PrefillSummary(1.5, 2.5, 4096, 0, {"s-0": 7})
    assert list(worker.asked.token_ids) == [3, 1, 4]
    assert wire.shard_map_from_proto(worker.asked.shard_map) == MAP


async def test_leaving_a_prefill_cancels_it_on_the_worker(client, worker):
    progress = client.prefill("ctx-1", range(10_000), IDENTITY, MAP, b"")
    assert (await anext(progress)).layers_done == 1
    await progress.aclose()
    await asyncio.wait_for(worker.cancelled.wait(), BOUNDED_S)


async def test_cancelling_the_task_of_a_prefill_cancels_it_on_the_worker(client, worker):
    started = asyncio.Event()

    async def run():
        async for _ in client.prefill("ctx-1", range(10_000), IDENTITY, MAP, b""):
            started.set()

    task = asyncio.create_task(run())
    await asyncio.wait_for(started.wait(), BOUNDED_S)
    task.cancel()
    await asyncio.wait_for(worker.cancelled.wait(), BOUNDED_S)


async def test_a_refused_prefill_says_why(client):
    with pytest.raises(InvalidRequest, match="at least one token"):
        await anext(client.prefill("ctx-1", [], IDENTITY, MAP, b""))


async def test_sessions_are_opened_and_closed(client, worker):
    budget = Budget(mass=0.98, floor=64, ceiling=4096)
    opened = await client.open_session(RECORD, IDENTITY, MAP, b"cap", budget, 0.75)
    assert opened == (64, 4096)
    assert wire.session_record_from_proto(worker.asked.record) == RECORD
    assert wire.budget_from_proto(worker.asked.budget) == budget
    assert worker.asked.min_coverage == 0.75
    assert await client.close_session("s-1", close_on_nodes=False) is True
    assert worker.asked.close_on_nodes is False
    assert await client.close_session("s-2") is False


async def test_a_full_worker_says_when_to_come_back(client):
    record = SessionRecord("full", "", 0, "t", 1)
    with pytest.raises(ResourceExhausted, match="limit is 16") as caught:
        await client.open_session(record, IDENTITY, MAP, b"", Budget(exact=True), 1.0)
    assert caught.value.retry_after_s == 1.0


async def test_status_is_read_whole(client):
    assert await client.status() == STATUS
