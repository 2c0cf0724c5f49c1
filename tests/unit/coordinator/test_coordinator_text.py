"""Generations as text: stop texts and streaming over the whole server, with a real tokenizer."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator

import grpc
import pytest
import tokenizers
from conftest import World, eventually, new_world, raised, running_world
from coordinator_doubles import answer, model_info
from tokenizers import decoders, models, pre_tokenizers

from longreach.errors import Unavailable
from longreach.v1 import generation_pb2 as pb


@pytest.fixture(scope="module")
def core() -> tokenizers.Tokenizer:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


@pytest.fixture
async def text_world(core, tmp_path) -> AsyncGenerator[World, None]:
    core.save(str(tmp_path / "tokenizer.json"))
    world = new_world()
    world.workers["worker-0"].model = model_info(source=str(tmp_path), eos_ids=())
    async with running_world(world):
        yield world
    world.stop_doubles()


async def _ask(world, text, **fields):
    request = pb.GenerateRequest(text=text, **fields)
    pieces, summary = [], None
    async for reply in world.stub.Generate(request):
        pieces.extend((token.token_id, token.text) for token in reply.tokens)
        summary = reply.summary if reply.HasField("summary") else summary
    return pieces, summary


async def test_text_goes_in_and_comes_out(text_world, core):
    pieces, summary = await _ask(text_world, "grüße", max_tokens=40)
    prompt = core.encode("grüße").ids
    ids = answer(prompt, 40)
    assert [token_id for token_id, _ in pieces] == ids
    assert "".join(text for _, text in pieces) == core.decode(ids)
    assert summary.usage.prompt_tokens == len(prompt)


async def test_a_stop_text_ends_the_answer_and_never_shows(text_world, core):
    prompt = core.encode("tell me").ids
    full = core.decode(answer(prompt, 60))
    letters = [i for i in range(10, 50) if full[i : i + 3].isascii() and len(full[i : i + 3]) == 3]
    assert letters, "the rule of the double makes no three plain characters in a row"
    stop = full[letters[0] : letters[0] + 3]
    pieces, summary = await _ask(text_world, "tell me", max_tokens=60, stop_texts=[stop, "zzzz"])
    assert summary.finish_reason == pb.FINISH_REASON_STOP
    assert "".join(text for _, text in pieces) == full[: full.index(stop)]
    assert summary.usage.completion_tokens < 60


async def test_text_held_back_for_a_stop_text_comes_out_at_the_end(text_world, core):
    prompt = core.encode("tell me").ids
    full = core.decode(answer(prompt, 30))
    almost = full[-1] + "never"
    pieces, summary = await _ask(text_world, "tell me", max_tokens=30, stop_texts=[almost])
    assert summary.finish_reason == pb.FINISH_REASON_LENGTH
    assert "".join(text for _, text in pieces) == full


async def test_a_context_of_text_pieces_is_their_concatenation(text_world, core):
    async def requests():
        yield pb.CreateContextRequest(options=pb.CreateContextOptions(name="pieces"))
        for piece in ("Grü", "ße aus", " Zürich"):
            yield pb.CreateContextRequest(text=piece)

    replies = [reply async for reply in text_world.stub.CreateContext(requests())]
    whole = core.encode("Grüße aus Zürich").ids
    again = await text_world.create(whole)
    assert again[-1].found
    assert again[-1].context.context_id == replies[-1].context.context_id
    pieces, _ = await _ask(text_world, "?", context_id=again[-1].context.context_id, max_tokens=5)
    assert [i for i, _ in pieces] == answer([*whole, *core.encode("?").ids], 5)


async def test_a_frozen_worker_is_given_up_when_it_counts_as_dead(monkeypatch):
    monkeypatch.setattr("coordinator.cluster.SUSPECT_AFTER_S", 0.4)
    monkeypatch.setattr("coordinator.cluster.DEAD_AFTER_S", 0.8)
    monkeypatch.setattr("coordinator.coordinator.TICK_S", 0.05)
    world = new_world()
    async with running_world(world):
        worker = world.workers["worker-0"]
        worker.step_gate.clear()
        call = asyncio.create_task(world.generate([1], max_tokens=4))
        await eventually(lambda: worker.steps)
        world.silent.add("worker-0")
        error = await raised(call)
        assert isinstance(error, Unavailable)
        assert error.reason == "NO_WORKER"
        worker.step_gate.set()
        world.silent.clear()
        await world.beat()
        assert (await world.generate([1], max_tokens=4)).token_ids == answer([1], 4)
    world.stop_doubles()


async def test_a_context_of_another_revision_is_refused_by_name():
    world = new_world()
    async with running_world(world):
        context = await world.context([1, 2, 3])
        worker = world.workers["worker-0"]
        newer = dataclasses.replace(worker.model.identity, revision="rev-2")
        worker.model = model_info(revision="rev-2", identity=newer)
        world.incarnations["worker-0"] = 2
        await world.beat()
        error = await raised(world.generate([4], context_id=context.context_id, max_tokens=1))
        assert error.reason == "IDENTITY_MISMATCH"
        assert "rev-1" in error.message
        assert "rev-2" in error.message
        other = await world.context([1, 2, 3])
        assert other.context_id != context.context_id
    world.stop_doubles()


async def test_a_deadline_ends_the_generation_everywhere(text_world):
    worker = text_world.workers["worker-0"]
    worker.step_gate.clear()
    request = pb.GenerateRequest(text="slow", max_tokens=9)
    with pytest.raises(grpc.RpcError) as caught:
        [reply async for reply in text_world.stub.Generate(request, timeout=0.3)]
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    worker.step_gate.set()
    await eventually(lambda: worker.opened and worker.opened == worker.closed)
