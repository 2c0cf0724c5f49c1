"""The HTTP gateway, asked by the real `openai` client."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import ssl
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import openai
import pytest
import tokenizers
from conftest import World, eventually, new_world, running_world
from coordinator_doubles import answer, model_info
from cryptography import x509
from tokenizers import decoders, models, pre_tokenizers

from coordinator.config import CoordinatorConfig
from coordinator.gateway.chat import ChatTemplate
from coordinator.gateway.openai_requests import Message, WrongField
from coordinator.server import CoordinatorServer
from longreach.errors import FailedPrecondition
from longreach.security.authority import Authority
from longreach.security.peers import PeerIdentity, Role
from longreach.security.tls import member_files
from longreach.v1 import generation_pb2 as pb

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no role ' + message.role) }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
KEY = "key-1"


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
async def world(core: tokenizers.Tokenizer, tmp_path: Path) -> AsyncGenerator[World, None]:
    core.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "!"}, "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "keys").write_text(f"# who may\n{KEY}  # the app\nkey-2\n")
    made = new_world()
    made.config = dataclasses.replace(
        made.config,
        http_listen="127.0.0.1:0",
        api_keys_file=str(tmp_path / "keys"),
        max_context_bytes=4096,
    )
    made.workers["worker-0"].model = model_info(source=str(tmp_path), eos_ids=())
    async with running_world(made):
        yield made
    made.stop_doubles()


def url_of(world: World) -> str:
    assert world.server is not None
    assert world.server.gateway is not None
    return f"http://{world.server.gateway.address}"


@pytest.fixture
async def client(world: World) -> AsyncGenerator[openai.AsyncOpenAI, None]:
    async with openai.AsyncOpenAI(
        base_url=f"{url_of(world)}/v1", api_key=KEY, max_retries=0, timeout=20
    ) as made:
        yield made


async def stored(world: World) -> str:
    """The id of a context of 199 tokens."""
    requests = [pb.CreateContextRequest(tokens=pb.TokenIds(ids=range(1, 200)))]
    metadata = (("authorization", f"Bearer {KEY}"),)
    replies = [each async for each in world.stub.CreateContext(iter(requests), metadata=metadata)]
    return str(replies[-1].context.context_id)


async def test_models_are_listed_and_found_by_name(client: openai.AsyncOpenAI) -> None:
    assert [each.id for each in (await client.models.list()).data] == ["tiny"]
    assert (await client.models.retrieve("tiny")).owned_by == "longreach"
    with pytest.raises(openai.NotFoundError, match="'large' is not served; served: tiny"):
        await client.models.retrieve("large")


async def test_a_completion_is_the_text_that_grpc_gives(
    world: World, client: openai.AsyncOpenAI, core: tokenizers.Tokenizer
) -> None:
    prompt = core.encode("grüße").ids
    reply = await client.completions.create(model="tiny", prompt="grüße", max_tokens=40)
    assert reply.choices[0].text == core.decode(answer(prompt, 40))
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt), 40)
    figures = reply.model_extra["longreach"]  # type: ignore[index]
    assert figures["coverage"] == 1.0
    assert {"scan_fraction", "sketch_fraction", "attended_fraction", "bytes_fraction"} <= set(
        figures
    )
    by_ids = await client.completions.create(model="tiny", prompt=prompt, max_tokens=40)
    assert by_ids.choices[0].text == reply.choices[0].text
    assert (await client.completions.create(model="tiny", prompt="x")).usage.completion_tokens == 16  # type: ignore[union-attr]


async def test_a_stream_is_the_same_text_in_pieces_with_its_usage_at_the_end(
    client: openai.AsyncOpenAI, core: tokenizers.Tokenizer
) -> None:
    stream = await client.completions.create(
        model="tiny",
        prompt="tell me",
        max_tokens=30,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
    wanted = core.decode(answer(core.encode("tell me").ids, 30))
    assert "".join(piece.text for piece in pieces) == wanted
    assert [piece.finish_reason for piece in pieces][-1] == "length"
    assert not any(piece.finish_reason for piece in pieces[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 30
    assert len({chunk.id for chunk in chunks}) == 1


async def test_a_chat_is_rendered_by_the_models_own_template(
    client: openai.AsyncOpenAI, core: tokenizers.Tokenizer
) -> None:
    prompt = core.encode("!<system>Be brief.\n<user>Who?\n<assistant>").ids
    wanted = core.decode(answer(prompt, 12))
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who?"}]},
    ]
    reply = await client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=12
    )
    assert reply.choices[0].message.content == wanted
    assert reply.choices[0].message.role == "assistant"
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(prompt)
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=12, stream=True
        )
    ]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == wanted
    assert [delta.role for delta in deltas if delta.role] == ["assistant"]
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_a_stop_text_ends_the_answer_and_never_shows(
    client: openai.AsyncOpenAI, core: tokenizers.Tokenizer
) -> None:
    full = core.decode(answer(core.encode("tell me").ids, 60))
    at = next(i for i in range(10, 50) if full[i : i + 3].isascii() and len(full[i : i + 3]) == 3)
    stop = full[at : at + 3]
    reply = await client.completions.create(
        model="tiny", prompt="tell me", max_tokens=60, stop=[stop, "zzzz"]
    )
    assert reply.choices[0].text == full[: full.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


async def test_sampling_and_our_own_fields_reach_the_worker(
    world: World, client: openai.AsyncOpenAI
) -> None:
    context = await stored(world)
    await client.completions.create(
        model="tiny",
        prompt="?",
        max_tokens=2,
        temperature=0.25,
        top_p=0.5,
        seed=7,
        extra_body={"context": context, "budget": "exact", "top_k": 9},
    )
    record = world.workers["worker-0"].records[-1]
    assert record.context_id == context
    sampling = record.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (
        0.25,
        0.5,
        9,
        7,
    )
    for _ in range(2):
        await client.completions.create(model="tiny", prompt="?", max_tokens=2)
    first, second = (each.sampling for each in world.workers["worker-0"].records[-2:])
    assert first.temperature == 1.0, "OpenAI's default, not greedy"
    assert first.seed != second.seed, "a request without a seed is not the same as the last one"


async def test_log_probabilities_have_openais_shapes(client: openai.AsyncOpenAI) -> None:
    text = await client.completions.create(model="tiny", prompt="a", max_tokens=3, logprobs=2)
    logprobs = text.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.token_logprobs or []) == len(logprobs.text_offset or []) == 3
    messages: Any = [{"role": "user", "content": "a"}]
    chat = await client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=3, logprobs=True, top_logprobs=1
    )
    assert chat.choices[0].logprobs is not None
    assert len(chat.choices[0].logprobs.content or []) == 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": 5}, "stop"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"budget": "lots"}, "budget"),
        ({"seed": 2**70}, "seed"),
    ],
)
async def test_wrong_fields_are_refused_by_name(
    client: openai.AsyncOpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="tiny", prompt="a", extra_body=fields)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


async def test_refusals_have_openais_statuses(
    world: World, client: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(openai.AuthenticationError) as wrong_key:
        await client.with_options(api_key="guess").models.list()
    assert wrong_key.value.code == "bad_api_key"
    assert (await client.with_options(api_key="key-2").models.list()).data
    with pytest.raises(openai.NotFoundError, match="no context 'ctx-none'"):
        await client.completions.create(
            model="tiny", prompt="a", extra_body={"context": "ctx-none"}
        )
    with pytest.raises(openai.BadRequestError, match="accepts") as too_long:
        await client.completions.create(model="tiny", prompt="a", max_tokens=10**6)
    assert too_long.value.code == "too_long"
    with pytest.raises(openai.APIStatusError) as too_large:
        await client.completions.create(model="tiny", prompt="a" * 3 * 2**20)
    assert too_large.value.status_code == 413
    world.silent.add("worker-0")
    await world.leave("worker-0")
    with pytest.raises(openai.InternalServerError) as nobody:
        await client.completions.create(model="tiny", prompt="a")
    assert nobody.value.status_code == 503
    assert int(nobody.value.response.headers["Retry-After"]) >= 1
    assert nobody.value.code == "no_worker"


async def test_a_full_queue_says_when_to_come_back(
    world: World, client: openai.AsyncOpenAI
) -> None:
    assert world.server is not None
    worker = world.workers["worker-0"]
    worker.step_gate.clear()
    admission = world.server.coordinator.sessions._admission
    slots = world.workers["worker-0"].status().max_sessions
    calls = [
        asyncio.create_task(client.completions.create(model="tiny", prompt="a"))
        for _ in range(slots + admission._max_waiting)
    ]
    await eventually(lambda: admission.waiting == admission._max_waiting)
    with pytest.raises(openai.RateLimitError) as caught:
        await client.completions.create(model="tiny", prompt="a")
    assert int(caught.value.response.headers["Retry-After"]) >= 1
    worker.step_gate.set()
    for reply in await asyncio.gather(*calls):
        assert reply.usage is not None
        assert reply.usage.completion_tokens == 16


async def test_a_client_that_leaves_frees_its_slot(
    world: World, client: openai.AsyncOpenAI
) -> None:
    assert world.server is not None
    sessions = world.server.coordinator.sessions
    stream = await client.completions.create(model="tiny", prompt="a", max_tokens=3000, stream=True)
    async for _ in stream:
        break
    assert sessions.running == 1
    await stream.close()
    await eventually(lambda: sessions.running == 0)


async def test_a_fault_in_a_stream_ends_it_with_an_error(
    world: World, client: openai.AsyncOpenAI
) -> None:
    context = await stored(world)
    stream = await client.completions.create(
        model="tiny", prompt="a", max_tokens=3000, stream=True, extra_body={"context": context}
    )
    await anext(aiter(stream))
    metadata = (("authorization", f"Bearer {KEY}"),)
    await world.stub.DeleteContext(pb.DeleteContextRequest(context_id=context), metadata=metadata)

    async def read_on() -> None:
        async for _ in stream:
            pass

    with pytest.raises(openai.APIError, match="was deleted"):
        await read_on()


async def test_health_needs_no_key_and_other_paths_are_told_in_openais_form(world: World) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url_of(world)}/health") as reply:
            assert (reply.status, await reply.json()) == (200, {"ready": True})
        headers = {"Authorization": f"Bearer {KEY}"}
        for method, path, status in (
            ("GET", "/v2/models", 404),
            ("GET", "/v1/completions", 405),
            ("POST", "/v1/completions", 400),
        ):
            async with session.request(
                method, url_of(world) + path, data=b"{", headers=headers
            ) as reply:
                assert reply.status == status
                assert (await reply.json())["error"]["message"]


async def test_keys_guard_grpc_too_and_are_read_again_when_they_change(
    world: World, tmp_path: Path, client: openai.AsyncOpenAI
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.stub.ListContexts(pb.ListContextsRequest())
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    metadata = (("authorization", "Bearer key-2"),)
    await world.stub.ListContexts(pb.ListContextsRequest(), metadata=metadata)
    (tmp_path / "keys").write_text("key-3\n")

    async def only_the_new_key_is_known() -> bool:
        try:
            await client.with_options(api_key="key-2").models.list()
        except openai.AuthenticationError:
            return bool((await client.with_options(api_key="key-3").models.list()).data)
        return False

    async with asyncio.timeout(5):
        while not await only_the_new_key_is_known():
            await asyncio.sleep(0.05)


async def test_with_tls_it_is_https_with_the_certificate_that_the_files_hold(
    tmp_path: Path,
) -> None:
    authority = Authority.create(tmp_path / "pki")
    files = authority.issue(PeerIdentity(Role.COORDINATOR, "coordinator-0"))
    config = CoordinatorConfig(
        listen="127.0.0.1:0",
        http_listen="127.0.0.1:0",
        cluster_secret="s",
        tls_cert=str(files.certificate),
        tls_key=str(files.key),
        tls_ca=str(files.ca),
    )
    server = CoordinatorServer(config, member_files(config, Role.COORDINATOR))
    await server.start()
    assert server.gateway is not None
    trusted = ssl.create_default_context(cafile=str(files.ca))
    name = "coordinator.longreach.internal"
    url = f"https://{server.gateway.address}/health"

    async def serial() -> int:
        """Of a new connection, over which the API answers."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(url, ssl=trusted, server_hostname=name) as reply,
        ):
            assert (reply.status, await reply.json()) == (503, {"ready": False})
        host, _, port = server.gateway.address.rpartition(":")  # type: ignore[union-attr]
        _, writer = await asyncio.open_connection(
            host, int(port), ssl=trusted, server_hostname=name
        )
        raw = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return x509.load_der_x509_certificate(raw).serial_number

    before = await serial()
    assert await serial() == before
    authority.issue(PeerIdentity(Role.COORDINATOR, "coordinator-0"))
    async with asyncio.timeout(10):
        while await serial() == before:
            await asyncio.sleep(0.1)
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientError):
            await session.get(url.replace("https", "http"))
    await server.stop()


# Chat templates.


def test_a_template_that_refuses_says_why() -> None:
    template = ChatTemplate(TEMPLATE, {"bos_token": "!"})
    with pytest.raises(WrongField, match="no role tool"):
        template.render([Message("tool", "x")])


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    for text in (
        "{{ messages.__class__.__mro__[-1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for m in messages %}{{ m.update({'content': 'x'}) }}{% endfor %}",
    ):
        with pytest.raises(WrongField, match="refuses"):
            ChatTemplate(text, {}).render([Message("user", "x")])


def test_a_model_without_a_template_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"use /v1/completions, or .* chat_template"):
        ChatTemplate.load(str(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}.")
    assert ChatTemplate.load(str(tmp_path)).render([Message("user", "x")]) == "x."
    override = tmp_path / "mine"
    override.write_text("mine")
    assert ChatTemplate.load(str(tmp_path), str(override)).render([Message("user", "x")]) == "mine"


def test_templates_render_as_transformers_renders_them() -> None:
    """The renderer of the library that models are published with is the reference."""
    from transformers.utils.chat_template_utils import render_jinja_template

    text = (
        "{%- for m in messages %}\n    {%- if loop.first and m.role == 'system' %}\n"
        "        {%- continue %}\n    {%- endif %}\n"
        "[{{ m.role | upper }}] {{ m.content | trim | tojson }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n[ASSISTANT]{% endif %}"
    )
    messages = [Message("system", "s"), Message("user", " <a> & 'é' "), Message("assistant", "b")]
    plain = [{"role": each.role, "content": each.content} for each in messages]
    (wanted,), _ = render_jinja_template(
        [plain], chat_template=text, add_generation_prompt=True, tools=None
    )
    assert ChatTemplate(text, {}).render(messages) == wanted
