"""Several coordinators: calls go on at another one, and no token comes twice or not at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from conftest import AwaitableClient

from longreach.errors import ConnectionLost, InvalidRequest, NotFound, Unavailable
from longreach.rpc.channels import server_options
from longreach.sdk import AsyncClient, Client
from longreach.sdk.retries import ROUND_PAUSE_S, Retries
from longreach.v1 import generation_pb2 as pb
from longreach.v1 import generation_pb2_grpc
from tests.scripted_generation import ScriptedService

WHOLE = list(range(20, 40))
LOST = ConnectionLost("gone")


class Coordinator(ScriptedService):
    """Generates WHOLE from where the client stands; its connection breaks after `tokens_max`."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens_max = len(WHOLE)
        self.frozen = threading.Event()
        self.server = grpc.server(ThreadPoolExecutor(8), options=server_options())
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def Generate(self, request: Any, context: Any) -> Iterator[Any]:
        copy = pb.GenerateRequest()
        copy.CopyFrom(request)
        self.received.append(copy)
        for sent, token_id in enumerate(WHOLE[len(request.resume.token_ids) :]):
            if sent == self.tokens_max:
                context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            yield pb.GenerateResponse(tokens=[pb.GeneratedToken(token_id=token_id, text=".")])
        summary = pb.GenerateSummary(
            finish_reason=pb.FINISH_REASON_LENGTH, resumed=request.resume.attempt
        )
        yield pb.GenerateResponse(request_id=request.request_id, summary=summary)


@pytest.fixture
def pair() -> Iterator[tuple[Coordinator, Coordinator]]:
    both = (Coordinator(), Coordinator())
    yield both
    for each in both:
        each.server.stop(None).wait()


@pytest.fixture(params=["sync", "async"])
async def client(request: pytest.FixtureRequest, pair: tuple[Coordinator, Coordinator]) -> Any:
    addresses = ",".join(each.address for each in pair)
    made: Any = (
        AsyncClient(addresses, timeout_s=20, retry_s=1.0)
        if request.param == "async"
        else AwaitableClient(Client(addresses, timeout_s=20, retry_s=1.0))
    )
    yield made
    await made.close()


async def test_a_generation_goes_on_at_another_coordinator(client: Any, pair: Any) -> None:
    pair[0].tokens_max = 7
    generation = await client.generate([1], seed=3)
    assert [token.id for token in generation.tokens] == WHOLE
    assert generation.text == "." * len(WHOLE)
    assert generation.resumed == 1
    first, second = pair[0].received[0], pair[1].received[0]
    assert (first.resume.attempt, list(first.resume.token_ids)) == (0, [])
    assert (second.resume.attempt, list(second.resume.token_ids)) == (1, WHOLE[:7])
    # All else is the same: who it is, and what was asked.
    assert second.resume.key == first.resume.key
    assert len(first.resume.key) >= 16
    assert second.request_id == first.request_id == generation.request_id
    second.resume.CopyFrom(first.resume)
    assert second == first


async def test_each_attempt_begins_where_the_one_before_ended(client: Any, pair: Any) -> None:
    pair[0].tokens_max, pair[1].tokens_max = 4, 3
    generation = await client.generate([1])
    assert [token.id for token in generation.tokens] == WHOLE
    attempts = sorted(
        (each.resume.attempt, len(each.resume.token_ids)) for one in pair for each in one.received
    )
    assert attempts == [(0, 0), (1, 4), (2, 7), (3, 11), (4, 14), (5, 18)]


async def test_generations_have_keys_of_their_own(client: Any, pair: Any) -> None:
    await client.generate([1])
    await client.generate([1])
    keys = [each.resume.key for each in pair[0].received]
    assert len(set(keys)) == 2


async def test_other_calls_are_made_at_another_coordinator_too(client: Any, pair: Any) -> None:
    pair[1].status = pb.GetStatusResponse(version="2")
    reply = pb.CreateContextResponse(
        context=pb.Context(context_id="ctx-1", state=pb.CONTEXT_STATE_READY)
    )
    pair[1].create_replies = [reply]
    pair[0].server.stop(None).wait()
    assert (await client.status()).version == "2"
    assert (await client.contexts.create(text="a text")).id == "ctx-1"
    assert "".join(each.text for each in pair[1].received) == "a text"


async def test_a_refusal_is_no_reason_to_ask_elsewhere(client: Any, pair: Any) -> None:
    pair[0].error = NotFound("no such context")
    with pytest.raises(NotFound, match="no such context"):
        await client.contexts.delete("ctx-1")
    assert not pair[1].received


async def test_what_no_coordinator_can_do_was_asked_of_each_once(client: Any, pair: Any) -> None:
    for number, each in enumerate(pair):
        each.error = Unavailable(f"no worker for {number}", reason="NO_WORKER")
    with pytest.raises(Unavailable, match="no worker for 1"):
        await client.contexts.delete("ctx-1")
    assert pair[0].error is not None
    pair[1].error = None
    assert await client.contexts.delete("ctx-1") == 77


async def test_a_coordinator_that_drains_sends_its_clients_on(client: Any, pair: Any) -> None:
    pair[0].error = Unavailable("shutting down", reason="DRAINING")
    assert await client.contexts.delete("ctx-1") == 77


async def test_when_no_coordinator_answers_the_call_fails_in_time(client: Any, pair: Any) -> None:
    for each in pair:
        each.server.stop(None).wait()
    with pytest.raises(ConnectionLost):
        await client.generate([1])


def test_content_from_an_iterator_is_not_sent_twice(pair: Any) -> None:
    pair[0].error = Unavailable("shutting down", reason="DRAINING")
    addresses = ",".join(each.address for each in pair)
    with (
        Client(addresses, timeout_s=20) as client,
        pytest.raises(Unavailable, match="shutting down"),
    ):
        client.contexts.create(text=iter(["a", "b"]))
    assert not pair[1].received


class TestRetries:
    def test_every_coordinator_is_asked_before_there_is_a_pause(self) -> None:
        retries = Retries(3, 1, clock=lambda: 0.0)
        pauses = [retries.failed(LOST) for _ in range(4)]
        assert pauses == [0.0, 0.0, ROUND_PAUSE_S, 0.0]
        assert retries.index == 2
        assert retries.attempt == 4

    def test_patience_runs_from_the_last_sign_of_life(self) -> None:
        now = 0.0
        retries = Retries(2, 0, 5.0, clock=lambda: now)
        assert retries.failed(LOST) is not None
        now = 4.0
        retries.begun()
        now = 8.0
        assert retries.failed(LOST) is not None
        now = 12.9
        assert retries.failed(LOST) is not None
        now = 13.0
        assert retries.failed(LOST) is None

    def test_a_single_coordinator_is_asked_again_only_about_what_had_begun(self) -> None:
        retries = Retries(1, 0)
        assert retries.failed(LOST) is None
        retries.begun()
        assert retries.failed(LOST) == ROUND_PAUSE_S

    def test_a_later_attempt_waits_for_what_a_coordinator_lacks_at_first(self) -> None:
        retries = Retries(2, 0)
        refused = Unavailable("no worker is alive", reason="NO_WORKER")
        assert [retries.failed(refused), retries.failed(refused)] == [0.0, None]
        assert retries.failed(LOST) is not None
        assert retries.failed(refused) is not None
        assert retries.failed(InvalidRequest("bad")) is None
