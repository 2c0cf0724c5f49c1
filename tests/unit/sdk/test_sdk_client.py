"""Both clients against a server that plays a script."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from longreach.errors import (
    Cancelled,
    CoverageTooLow,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidRequest,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from longreach.sdk import AsyncClient, Budget, Client
from longreach.v1 import common_pb2
from longreach.v1 import generation_pb2 as pb


def _context(state: Any = pb.CONTEXT_STATE_READY, **fields: Any) -> pb.Context:
    return pb.Context(context_id="ctx-1", state=state, **fields)


def _tokens(*texts: str) -> pb.GenerateResponse:
    tokens = [pb.GeneratedToken(token_id=i, text=text) for i, text in enumerate(texts)]
    return pb.GenerateResponse(request_id="r", tokens=tokens)


def _summary(**fields: Any) -> pb.GenerateResponse:
    summary = pb.GenerateSummary(finish_reason=pb.FINISH_REASON_STOP, **fields)
    return pb.GenerateResponse(request_id="r", summary=summary)


async def test_create_streams_a_text_in_pieces_after_its_options(client: Any, service: Any) -> None:
    service.create_replies = [pb.CreateContextResponse(context=_context(tokens=9), found=True)]
    text = "grüße " * 300_000

    context = await client.contexts.create(text=text, name="g", model="m", placement="layer")

    options, *pieces = service.received
    assert (options.options.name, options.options.model, options.options.placement) == (
        "g", "m", "layer",
    )  # fmt: skip
    assert len(pieces) > 1
    assert "".join(piece.text for piece in pieces) == text
    assert context.id == "ctx-1"
    assert context.tokens == 9
    assert context.found


async def test_create_streams_a_file_and_token_ids(
    client: Any, service: Any, tmp_path: Path
) -> None:
    service.create_replies = [pb.CreateContextResponse(context=_context())]
    path = tmp_path / "document.txt"
    path.write_text("öffne das Tor\n" * 100_000, encoding="utf-8")

    await client.contexts.create(path=path)
    assert "".join(each.text for each in service.received[1:]) == path.read_text(encoding="utf-8")

    service.received.clear()
    await client.contexts.create(tokens=range(100_000))
    ids = [token for each in service.received[1:] for token in each.tokens.ids]
    assert ids == list(range(100_000))


async def test_create_reports_progress_in_order(client: Any, service: Any) -> None:
    filling = _context(pb.CONTEXT_STATE_FILLING, prefill_fraction=0.5)
    service.create_replies = [
        pb.CreateContextResponse(context=filling),
        pb.CreateContextResponse(context=_context(prefill_fraction=1.0)),
    ]
    seen: list[tuple[str, float]] = []
    await client.contexts.create(
        text="x", on_progress=lambda context: seen.append((context.state, context.prefill_fraction))
    )
    assert seen == [("filling", 0.5), ("ready", 1.0)]


async def test_an_error_of_the_documents_source_reaches_the_caller_and_cancels_the_call(
    client: Any, service: Any
) -> None:
    def pieces() -> Any:
        yield "first half"
        while len(service.received) < 2:
            time.sleep(0.01)
        raise OSError("the disk is gone")

    service.hold.clear()
    service.create_replies = [pb.CreateContextResponse(context=_context())]
    with pytest.raises(OSError, match="the disk is gone"):
        await client.contexts.create(text=pieces())
    assert await asyncio.to_thread(service.ended.wait, 10)
    assert service.cancelled


async def test_a_file_that_is_not_utf8_is_refused(client: Any, tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"caf" + "é".encode("latin-1"))
    with pytest.raises(InvalidRequest, match="not UTF-8 at byte 3"):
        await client.contexts.create(path=path)


async def test_an_exception_in_on_progress_cancels_the_call(client: Any, service: Any) -> None:
    service.hold.clear()
    service.create_replies = [pb.CreateContextResponse(context=_context())] * 2

    def fail(_: object) -> None:
        raise RuntimeError("the window was closed")

    with pytest.raises(RuntimeError, match="window"):
        await client.contexts.create(text="x", on_progress=fail)
    assert await asyncio.to_thread(service.ended.wait, 10)
    assert service.cancelled


async def test_a_context_that_ends_failed_is_an_error_with_its_reason(
    client: Any, service: Any
) -> None:
    failed = _context(pb.CONTEXT_STATE_FAILED, error="node-1 has no room")
    service.create_replies = [pb.CreateContextResponse(context=failed)]
    with pytest.raises(FailedPrecondition, match="node-1 has no room"):
        await client.contexts.create(text="x")


async def test_contexts_are_got_listed_and_deleted(client: Any, service: Any) -> None:
    shard = common_pb2.Shard(
        shard_id="s0", span=common_pb2.Span(start=0, stop=9), layers=[0], kv_head_stop=2,
        node_ids=["n0"],
    )  # fmt: skip
    shards = common_pb2.ShardMap(
        shards=[shard], nodes=[common_pb2.NodeAddress(node_id="n0", address="h:1")], policy="layer"
    )
    service.contexts = [_context(name="book", kv_bytes=12, shard_map=shards)]
    (listed,) = await client.contexts.list()
    got = await client.contexts.get("ctx-1")
    assert got == listed
    assert (got.name, got.kv_bytes, got.shard_map.shards[0].node_ids) == ("book", 12, ("n0",))
    assert await client.contexts.delete(got) == 77
    assert [each.context_id for each in service.received] == ["ctx-1", "ctx-1"]


async def test_wait_indexed_polls_until_the_index_is_complete(client: Any, service: Any) -> None:
    service.contexts = [_context(index_fraction=share) for share in (0.0, 0.5, 1.0)]
    seen: list[float] = []
    context = await client.contexts.wait_indexed(
        "ctx-1", on_progress=lambda each: seen.append(each.index_fraction)
    )
    assert seen == [0.0, 0.5, 1.0]
    assert context.indexed


async def test_wait_indexed_gives_up_at_its_deadline_and_says_what_still_works(
    client: Any, service: Any
) -> None:
    service.contexts = [_context(index_fraction=0.25, index_kind="flat")] * 50
    with pytest.raises(DeadlineExceeded, match=r"25% built.*flat answers"):
        await client.contexts.wait_indexed("ctx-1", timeout_s=0.2)


async def test_wait_indexed_does_not_wait_for_a_failed_context(client: Any, service: Any) -> None:
    service.contexts = [_context(pb.CONTEXT_STATE_FAILED, error="lost")]
    with pytest.raises(FailedPrecondition, match="lost"):
        await client.contexts.wait_indexed("ctx-1")


async def test_wait_indexed_ends_when_the_index_cannot_be_built(client: Any, service: Any) -> None:
    service.contexts = [_context(index_fraction=0.5, index_kind="flat", index_error="no memory")]
    with pytest.raises(FailedPrecondition, match=r"no memory.*flat goes on answering") as raised:
        await client.contexts.wait_indexed("ctx-1")
    assert raised.value.reason == "INDEX_FAILED"


async def test_a_stream_gives_tokens_and_then_its_summary(client: Any, service: Any) -> None:
    work = common_pb2.WorkFigures(keys_in_scope=100, keys_scanned=10, keys_attended=5)
    service.generate_replies = [
        _tokens("Hel", "lo"),
        _tokens(" you"),
        _summary(
            usage=pb.Usage(context_tokens=7, prompt_tokens=3, completion_tokens=3),
            timing=pb.GenerationTiming(first_token_s=0.5, node_s=0.25),
            work=work,
            coverage=1.0,
            resident_kv_bytes=10,
            full_kv_bytes=1000,
            worker_id="w",
            index_kinds=["graph"],
        ),
    ]
    async with client.stream("hi", context="ctx-1") as stream:
        with pytest.raises(FailedPrecondition, match="read the stream to its end"):
            _ = stream.summary
        texts = [token.text async for token in stream]
        summary = stream.summary
    assert texts == ["Hel", "lo", " you"]
    assert summary.text == "Hello you"
    assert summary.finish_reason == "stop"
    assert summary.usage.completion_tokens == 3
    assert (summary.timing.first_token_s, summary.timing.node_s) == (0.5, 0.25)
    assert summary.work.scan_fraction == 0.1
    assert (summary.resident_kv_bytes, summary.full_kv_bytes) == (10, 1000)
    assert summary.index_kinds == ("graph",)


async def test_generate_sends_every_option(client: Any, service: Any) -> None:
    service.generate_replies = [_summary()]
    await client.generate(
        "hi", context="ctx-1", model="m", max_tokens=5, temperature=0.5, top_p=0.25, top_k=3,
        seed=2**63, stop=["\n", "END"], ignore_eos=True, budget="mass=0.5[64,4096]+tail",
        min_coverage=0.75, logprobs=2, request_id="mine",
    )  # fmt: skip
    (request,) = service.received
    expected = pb.GenerateRequest(
        model="m",
        context_id="ctx-1",
        text="hi",
        sampling=common_pb2.SamplingParams(temperature=0.5, top_p=0.25, top_k=3, seed=2**63),
        max_tokens=5,
        stop_texts=["\n", "END"],
        ignore_eos=True,
        budget=common_pb2.Budget(
            mass=common_pb2.MassRule(mass=0.5, floor=64, ceiling=4096), tail_estimate=True
        ),
        min_coverage=0.75,
        top_logprobs=2,
        request_id="mine",
    )
    assert request.resume.key
    request.ClearField("resume")
    assert request == expected


async def test_generate_takes_token_ids_and_a_budget_value(client: Any, service: Any) -> None:
    service.generate_replies = [_summary()]
    await client.generate([5, 6, 7], budget=Budget(exact=True), stop="END")
    (request,) = service.received
    assert list(request.tokens.ids) == [5, 6, 7]
    assert request.budget.all
    assert list(request.stop_texts) == ["END"]


async def test_an_empty_list_of_token_ids_is_sent_as_token_ids(client: Any, service: Any) -> None:
    service.generate_replies = [_summary()]
    await client.generate([])
    assert service.received[0].WhichOneof("prompt") == "tokens"


async def test_alternatives_come_with_their_token(client: Any, service: Any) -> None:
    token = pb.GeneratedToken(
        token_id=3, text="x", logprob=-0.5,
        alternatives=[pb.AlternativeToken(token_id=3, logprob=-0.5)],
    )  # fmt: skip
    service.generate_replies = [pb.GenerateResponse(tokens=[token]), _summary()]
    generation = await client.generate("hi", logprobs=1)
    assert generation.tokens[0].alternatives == ((3, -0.5),)
    assert generation.tokens[0].logprob == -0.5


async def test_leaving_a_stream_early_cancels_the_generation(client: Any, service: Any) -> None:
    service.hold.clear()
    service.generate_replies = [_tokens("a"), _tokens("b"), _summary()]
    async with client.stream("hi") as stream:
        async for token in stream:
            assert token.text == "a"
            break
    assert await asyncio.to_thread(service.ended.wait, 10)
    assert service.cancelled


async def test_reading_on_after_cancel_raises_cancelled(client: Any, service: Any) -> None:
    service.hold.clear()
    service.generate_replies = [_tokens("a"), _tokens("b"), _summary()]
    async with client.stream("hi") as stream:
        await anext(stream)
        stream.cancel()
        with pytest.raises(Cancelled, match="cancelled by its reader"):
            await anext(stream)


async def test_a_stream_without_a_summary_is_a_broken_server(client: Any, service: Any) -> None:
    service.generate_replies = [_tokens("a")]
    with pytest.raises(Internal, match="after 1 tokens without a summary"):
        await client.generate("hi")


@pytest.mark.parametrize(
    "error",
    [
        NotFound("no context 'ctx-2'"),
        ResourceExhausted("64 generations wait already", retry_after_s=1.5),
        CoverageTooLow("coverage is 0.5; the caller allowed 1"),
    ],
)
async def test_errors_of_the_server_keep_class_message_and_hint(
    client: Any, service: Any, error: Any
) -> None:
    service.error = error
    calls = (client.generate("hi"), client.contexts.list(), client.contexts.create(text="x"))
    for call in calls:
        with pytest.raises(type(error)) as caught:
            await call
        assert caught.value.message == error.message
        assert caught.value.retry_after_s == error.retry_after_s


async def test_a_deadline_ends_the_call(client: Any, service: Any) -> None:
    service.hold.clear()
    service.generate_replies = [_tokens("a"), _summary()]
    with pytest.raises(DeadlineExceeded):
        await client.generate("hi", timeout_s=0.3)


async def test_the_api_key_travels_as_a_bearer_token(client: Any, service: Any) -> None:
    await client.status()
    assert service.metadata["authorization"] == "Bearer key-1"


async def test_status_shows_every_member(client: Any, service: Any) -> None:
    member = pb.Member(
        member_id="node-0", kind="node", address="h:1", state="alive", age_s=0.5, used_bytes=3,
        limit_bytes=9, sessions=2, detail="avx2",
    )  # fmt: skip
    service.status = pb.GetStatusResponse(members=[member], epoch=4, models=["demo"], version="1")
    status = await client.status()
    assert (status.epoch, status.models, status.version) == (4, ("demo",), "1")
    assert status.members[0].id == "node-0"
    assert status.members[0].limit_bytes == 9


async def test_an_address_where_nobody_answers_is_named(client: Any) -> None:
    with (
        Client("127.0.0.1:1", timeout_s=5) as lonely,
        pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"),
    ):
        lonely.status()
    async with AsyncClient("127.0.0.1:1", timeout_s=5) as lonely_too:
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
            await lonely_too.status()


async def test_cancelling_the_task_cancels_the_creation_on_the_server(
    address: str, service: Any
) -> None:
    service.hold.clear()
    service.create_replies = [pb.CreateContextResponse(context=_context())] * 2
    async with AsyncClient(address) as client:
        seen = asyncio.Event()
        task = asyncio.create_task(
            client.contexts.create(text="x", on_progress=lambda _: seen.set())
        )
        await seen.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(service.ended.wait, 10)
    assert service.cancelled


async def test_cancelling_the_task_cancels_the_generation_on_the_server(
    address: str, service: Any
) -> None:
    service.hold.clear()
    service.generate_replies = [_tokens("a"), _tokens("b"), _summary()]
    async with AsyncClient(address) as client:
        task = asyncio.create_task(client.generate("hi"))
        while not service.received:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(service.ended.wait, 10)
    assert service.cancelled
