"""OpenAI's requests as this project's, checked field by field.

Fields that would change the answer and are not served are refused by name; unknown ones are
ignored, as OpenAI's own servers do, since clients send new ones all the time. Beside OpenAI's
fields a request may bring `context` (a stored context's id), `budget`, `min_coverage`, `top_k` and
`ignore_eos`: the openai client sends them by `extra_body`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.requests import GenerateParams, Prompt
from longreach.errors import InvalidRequest
from longreach.types import Budget, SamplingParams

Json = Mapping[str, Any]
SEED_MAX = 2**63

# Field: the value at which it asks for nothing.
_UNSERVED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
}


class WrongField(InvalidRequest):
    """A field of a request is wrong; `param` is its name, as OpenAI's errors have it."""

    def __init__(self, param: str, message: str, reason: str = "INVALID_REQUEST") -> None:
        super().__init__(message, reason=reason)
        self.param = param


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a chat."""

    role: str
    content: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """A request: `params` lacks the prompt where `messages` are to be rendered first."""

    params: GenerateParams
    messages: tuple[Message, ...] = ()
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False

    @property
    def chat(self) -> bool:
        """Whether it is a chat."""
        return bool(self.messages)


def read_completion(body: Json, request_id: str) -> Completion:
    """A request to /v1/completions; raises WrongField."""
    logprobs = _number(body, "logprobs", int, None)
    params = _params(body, request_id, _prompt(body), _number(body, "max_tokens", int, 16))
    return _completion(body, params, logprobs is not None, logprobs or 0, ())


def read_chat(body: Json, request_id: str) -> Completion:
    """A request to /v1/chat/completions; raises WrongField."""
    limit = _number(body, "max_completion_tokens", int, None)
    if limit is None:
        limit = _number(body, "max_tokens", int, 0)
    logprobs = _flag(body, "logprobs")
    alternatives = _number(body, "top_logprobs", int, 0)
    if alternatives and not logprobs:
        raise WrongField("top_logprobs", "top_logprobs needs logprobs: true")
    params = _params(body, request_id, Prompt(text=""), limit)
    return _completion(body, params, logprobs, alternatives, _messages(body))


def _completion(
    body: Json,
    params: GenerateParams,
    logprobs: bool,
    alternatives: int,
    messages: tuple[Message, ...],
) -> Completion:
    for field, nothing in _UNSERVED.items():
        if body.get(field) not in nothing:
            raise WrongField(field, f"{field} is {body[field]!r} and is not served; leave it out")
    options = body.get("stream_options") or {}
    if not isinstance(options, Mapping):
        raise WrongField("stream_options", "stream_options must be an object")
    params = dataclasses.replace(params, top_logprobs=alternatives)
    stream = _flag(body, "stream")
    return Completion(params, messages, stream, bool(options.get("include_usage")), logprobs)


def _params(body: Json, request_id: str, prompt: Prompt, max_tokens: int) -> GenerateParams:
    model = body.get("model", "")
    if not isinstance(model, str):
        raise WrongField("model", f"model is {model!r}; name one of /v1/models")
    if max_tokens < 0:
        raise WrongField("max_tokens", f"max_tokens is {max_tokens}; it must be positive")
    seed = _number(body, "seed", int, None)
    if seed is not None and not -SEED_MAX <= seed < SEED_MAX:
        raise WrongField("seed", f"seed is {seed}; it must fit 64 bits")
    sampling = SamplingParams(
        temperature=_number(body, "temperature", float, 1.0),
        top_p=_number(body, "top_p", float, 1.0),
        top_k=_number(body, "top_k", int, 0),
        seed=_default_seed(request_id) if seed is None else seed % SEED_MAX,
    )
    return GenerateParams(
        prompt=prompt,
        model=model,
        context_id=_text(body, "context"),
        sampling=sampling,
        max_tokens=max_tokens,
        stop_texts=_stops(body),
        ignore_eos=_flag(body, "ignore_eos"),
        budget=_budget(body),
        min_coverage=_number(body, "min_coverage", float, 0.0),
        request_id=request_id,
    )


def _default_seed(request_id: str) -> int:
    """Another one for every request, since sampling is a pure function of it."""
    return int.from_bytes(request_id.encode()[-7:], "big")


def _prompt(body: Json) -> Prompt:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return Prompt(text=prompt)
    if isinstance(prompt, list) and prompt and all(_is_token_id(each) for each in prompt):
        return Prompt(token_ids=tuple(prompt))
    raise WrongField(
        "prompt", "prompt must be one text or one list of token ids; send several as requests"
    )


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _messages(body: Json) -> tuple[Message, ...]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise WrongField("messages", "messages must be a list of at least one message")
    return tuple(_message(each, f"messages.{at}") for at, each in enumerate(messages))


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        raise WrongField(where, f"{where} must be an object with a role and content")
    content = value.get("content")
    if isinstance(content, list):
        parts = [each.get("text") for each in content if isinstance(each, Mapping)]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) != len(content):
            raise WrongField(f"{where}.content", "only parts of type text are served")
        content = "".join(texts)
    if not isinstance(content, str):
        raise WrongField(f"{where}.content", f"content is {content!r}; it must be text")
    return Message(value["role"], content, str(value.get("name") or ""))


def _stops(body: Json) -> tuple[str, ...]:
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise WrongField("stop", "stop must be a text or a list of texts")
    return tuple(stops)


def _budget(body: Json) -> Budget | None:
    text = _text(body, "budget")
    if not text:
        return None
    try:
        return Budget.parse(text)
    except ValueError as problem:
        raise WrongField("budget", str(problem)) from None


def _text(body: Json, field: str) -> str:
    value = body.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise WrongField(field, f"{field} is {value!r}; it must be text")
    return value


def _flag(body: Json, field: str) -> bool:
    value = body.get(field)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise WrongField(field, f"{field} is {value!r}; write true or false")
    return value


def _number(body: Json, field: str, kind: type, default: Any) -> Any:
    value = body.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise WrongField(field, f"{field} is {value!r}; it must be a number")
    if kind is int and value != int(value):
        raise WrongField(field, f"{field} is {value!r}; it must be a whole number")
    return kind(value)
