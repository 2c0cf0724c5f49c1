"""The HTTP server of the gateway: reads, calls, writes, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import secrets
import ssl
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from aiohttp import web

from coordinator.gateway.chat import ChatTemplate
from coordinator.gateway.openai_replies import Answer, error_object, model_object
from coordinator.gateway.openai_requests import Completion, read_chat, read_completion
from coordinator.generation import Token
from coordinator.models import Models
from coordinator.requests import GenerateParams, Prompt
from coordinator.summary import Summary
from longreach.errors import (
    Internal,
    InvalidRequest,
    LongreachError,
    NotFound,
    Unavailable,
)
from longreach.security.api_keys import ApiKeys

BODY_EXTRA_BYTES = 2**20
"""Room for JSON around the longest text of a context."""
_CLOSE_S = 1.0
_log = logging.getLogger(__name__)

Events = AsyncGenerator[tuple[Token, ...] | Summary, None]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Gateway:
    """OpenAI's API on `listen`. `generate` is Sessions.generate; `ready` says whether generations
    are taken."""

    def __init__(
        self,
        generate: Callable[[GenerateParams], Events],
        models: Models,
        keys: ApiKeys,
        ready: Callable[[], bool],
        *,
        body_bytes_max: int,
        chat_template: str = "",
    ) -> None:
        self._generate = generate
        self._models = models
        self._keys = keys
        self._ready = ready
        self._chat_template = chat_template
        self._templates: dict[str, ChatTemplate] = {}
        self._started = int(time.time())
        self._body_bytes_max = body_bytes_max + BODY_EXTRA_BYTES
        self._app = web.Application(
            middlewares=[self._mapped], client_max_size=self._body_bytes_max
        )
        self._app.router.add_get("/health", self._health)
        self._app.router.add_get("/v1/models", self._list_models)
        self._app.router.add_get("/v1/models/{name:.+}", self._one_model)
        self._app.router.add_post("/v1/completions", self._completions)
        self._app.router.add_post("/v1/chat/completions", self._chat)
        self._runner: web.AppRunner | None = None
        self.address = ""

    async def start(self, listen: str, context: ssl.SSLContext | None = None) -> None:
        """Begins to serve on host:port, which `address` is then, a free port resolved. Raises
        Unavailable when the port cannot be had."""
        host, _, port = listen.rpartition(":")
        # A client that leaves cancels its handler, and with it the generation.
        runner = web.AppRunner(self._app, handler_cancellation=True, shutdown_timeout=_CLOSE_S)
        await runner.setup()
        self._runner = runner
        try:
            await web.TCPSite(runner, host.strip("[]"), int(port), ssl_context=context).start()
        except (OSError, ValueError) as problem:
            raise Unavailable(f"http_listen {listen!r} cannot be had: {problem}") from None
        self.address = f"{host}:{runner.addresses[0][1]}"
        _log.info("OpenAI-compatible API on %s", self.address)

    async def stop(self) -> None:
        """Ends every call; drain the sessions first."""
        if self._runner is not None:
            await self._runner.cleanup()

    # Handlers.

    async def _health(self, request: web.Request) -> web.Response:
        ready = self._ready()
        return web.json_response({"ready": ready}, status=200 if ready else 503)

    async def _list_models(self, request: web.Request) -> web.Response:
        served = self._models.served().values()
        listed = [model_object(m.model, self._started, m.max_positions) for m in served]
        return web.json_response({"object": "list", "data": listed})

    async def _one_model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        model = self._models.choose(name)
        return web.json_response(model_object(name, self._started, model.max_positions))

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        wanted = read_completion(await _body(request), _request_id())
        return await self._answer(request, wanted)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        wanted = read_chat(await _body(request), _request_id())
        return await self._answer(request, await self._rendered(wanted))

    async def _rendered(self, wanted: Completion) -> Completion:
        """The chat with its messages as token ids: a template writes the beginning itself."""
        model = self._models.choose(wanted.params.model)
        template = self._templates.get(model.source)
        if template is None:
            template = await asyncio.to_thread(ChatTemplate.load, model.source, self._chat_template)
            self._templates[model.source] = template
        tokenizer = await self._models.tokenizer(model)
        text = template.render(wanted.messages)
        token_ids = await asyncio.to_thread(tokenizer.encode, text, starts=False)
        prompt = Prompt(token_ids=tuple(token_ids))
        return dataclasses.replace(wanted, params=dataclasses.replace(wanted.params, prompt=prompt))

    async def _answer(self, request: web.Request, wanted: Completion) -> web.StreamResponse:
        traceparent = request.headers.get("traceparent", "")
        params = dataclasses.replace(wanted.params, traceparent=traceparent)
        name = wanted.params.model or self._models.choose("").model
        answer = Answer(wanted, name, int(time.time()))
        async with contextlib.aclosing(self._generate(params)) as events:
            # Whatever can be refused is refused with a status, before a stream begins.
            first = await anext(events)
            if wanted.stream:
                return await self._stream(request, wanted, answer, first, events)
            tokens: list[Token] = []
            event = first
            while not isinstance(event, Summary):
                tokens.extend(event)
                event = await anext(events)
            return web.json_response(answer.whole(tokens, event))

    async def _stream(
        self,
        request: web.Request,
        wanted: Completion,
        answer: Answer,
        first: tuple[Token, ...] | Summary,
        events: Events,
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        await response.prepare(request)
        event, begins = first, True
        try:
            while not isinstance(event, Summary):
                await _send(response, answer.chunk(event, first=begins))
                begins = False
                event = await anext(events)
            await _send(response, answer.last_chunk(event))
            if wanted.include_usage:
                await _send(response, answer.usage_chunk(event))
        except LongreachError as error:
            await _send(response, error_object(error)[1])
        await response.write(b"data: [DONE]\n\n")
        return response

    @web.middleware
    async def _mapped(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Checks the key, and turns what is raised into OpenAI's errors."""
        try:
            if request.path != "/health":
                self._keys.check(request.headers.get("Authorization", ""))
            return await handler(request)
        except LongreachError as error:
            return _refusal(error)
        except web.HTTPRequestEntityTooLarge:
            said = (
                f"the request is larger than {self._body_bytes_max} bytes; send less, or start the "
                "coordinator with a larger --max-context-bytes"
            )
            return _refusal(InvalidRequest(said, reason="TOO_LARGE"))
        except web.HTTPNotFound:
            return _refusal(NotFound(f"no {request.method} {request.path} here", reason="NO_PATH"))
        except web.HTTPMethodNotAllowed as problem:
            allowed = ", ".join(sorted(problem.allowed_methods))
            said = f"{request.path} takes {allowed}, not {request.method}"
            refused = _refusal(InvalidRequest(said, reason="WRONG_METHOD"))
            refused.set_status(405)
            return refused
        except web.HTTPException:
            raise
        except Exception:
            _log.exception("%s %s failed", request.method, request.path)
            return _refusal(Internal("a bug; the coordinator's log says more"))


def _refusal(error: LongreachError) -> web.Response:
    status, body, headers = error_object(error)
    return web.json_response(body, status=status, headers=headers)


def _request_id() -> str:
    return f"req-{secrets.token_hex(12)}"


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.read())
    except ValueError as problem:
        raise InvalidRequest(f"the body is not JSON: {problem}") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    return body


async def _send(response: web.StreamResponse, message: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(message).encode() + b"\n\n")
