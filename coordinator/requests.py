"""What a client asks for, as values, and every check that needs no I/O.

Each check raises InvalidRequest (or NotFound) naming the value, the limit and the way out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.config import REPLICAS_MAX
from coordinator.failover import ATTEMPTS_MAX
from longreach.errors import InvalidRequest, NotFound, Unavailable
from longreach.steps import ModelInfo
from longreach.types import Budget, SamplingParams

STOP_TEXTS_MAX = 16
STOP_TEXT_CHARACTERS_MAX = 256
TOP_LOGPROBS_MAX = 20
REQUEST_ID_CHARACTERS_MAX = 128
NAME_CHARACTERS_MAX = 256


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text or token ids; exactly one is given."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class NewContext:
    """A context to store. `model` and `placement` may be empty: the served one, the planner's.
    `replicas` 0 means the server's default. `traceparent` is the caller's W3C trace context."""

    prompt: Prompt
    model: str = ""
    name: str = ""
    placement: str = ""
    replicas: int = 0
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Resume:
    """How a generation goes on where its coordinator was lost: `key` names it in the cluster,
    `attempt` counts from 0, `token_ids` are those that the client has."""

    key: str
    attempt: int = 0
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerateParams:
    """A generation to run. `max_tokens` 0 and `budget` None take the server's defaults;
    `min_coverage` 0 means 1. `traceparent` is the caller's W3C trace context, if it sent one."""

    prompt: Prompt
    model: str = ""
    context_id: str = ""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int = 0
    stop_texts: tuple[str, ...] = ()
    ignore_eos: bool = False
    budget: Budget | None = None
    min_coverage: float = 0.0
    top_logprobs: int = 0
    request_id: str = ""
    resume: Resume | None = None
    traceparent: str = ""

    @property
    def generated(self) -> tuple[int, ...]:
        """Tokens that the client has from earlier attempts."""
        return self.resume.token_ids if self.resume else ()


def check_new_context(request: NewContext, placements: Sequence[str]) -> None:
    """Checks the options of a context."""
    if len(request.name) > NAME_CHARACTERS_MAX:
        raise InvalidRequest(
            f"the name has {len(request.name)} characters; at most {NAME_CHARACTERS_MAX}"
        )
    if request.placement and request.placement not in placements:
        raise InvalidRequest(
            f"unknown placement policy {request.placement!r}; known: {', '.join(placements)}",
            reason="UNKNOWN_NAME",
        )
    if not 0 <= request.replicas <= REPLICAS_MAX:
        raise InvalidRequest(
            f"replicas is {request.replicas}; it must be in [1, {REPLICAS_MAX}], and 0 means the "
            "server's default"
        )


def check_generate(request: GenerateParams) -> None:
    """Checks everything about a generation that needs neither model nor context."""
    _check_sampling(request.sampling)
    _check_stop_texts(request.stop_texts)
    if request.max_tokens < 0:
        raise InvalidRequest(f"max_tokens is {request.max_tokens}; 0 means the server's default")
    if not 0 <= request.min_coverage <= 1:
        raise InvalidRequest(
            f"min_coverage is {request.min_coverage}; it must be in (0, 1], and 0 means 1"
        )
    if not 0 <= request.top_logprobs <= TOP_LOGPROBS_MAX:
        raise InvalidRequest(
            f"top_logprobs is {request.top_logprobs}; it must be in [0, {TOP_LOGPROBS_MAX}]"
        )
    if len(request.request_id) > REQUEST_ID_CHARACTERS_MAX:
        raise InvalidRequest(
            f"request_id has {len(request.request_id)} characters; at most "
            f"{REQUEST_ID_CHARACTERS_MAX}"
        )
    if request.resume is not None:
        _check_resume(request.resume)


def _check_resume(resume: Resume) -> None:
    if not 1 <= len(resume.key) <= REQUEST_ID_CHARACTERS_MAX:
        raise InvalidRequest(
            f"resume.key has {len(resume.key)} characters; it must have 1 to "
            f"{REQUEST_ID_CHARACTERS_MAX}, random ones"
        )
    if not 0 <= resume.attempt < ATTEMPTS_MAX:
        raise InvalidRequest(
            f"resume.attempt is {resume.attempt}; it must be in [0, {ATTEMPTS_MAX})"
        )


def _check_sampling(sampling: SamplingParams) -> None:
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise InvalidRequest(
            f"temperature is {sampling.temperature}; it must be 0 (greedy) or a positive number"
        )
    if not 0 <= sampling.top_p <= 1:
        raise InvalidRequest(
            f"top_p is {sampling.top_p}; it must be in (0, 1], and 0 or 1 switches it off"
        )
    if sampling.top_k < 0:
        raise InvalidRequest(f"top_k is {sampling.top_k}; it must be 0 (off) or positive")


def _check_stop_texts(texts: Sequence[str]) -> None:
    if len(texts) > STOP_TEXTS_MAX:
        raise InvalidRequest(f"{len(texts)} stop texts; at most {STOP_TEXTS_MAX}")
    for text in texts:
        if not text:
            raise InvalidRequest("a stop text is empty; leave it out")
        if len(text) > STOP_TEXT_CHARACTERS_MAX:
            raise InvalidRequest(
                f"a stop text has {len(text)} characters; at most {STOP_TEXT_CHARACTERS_MAX}"
            )


def check_token_ids(token_ids: Iterable[int], model: ModelInfo) -> None:
    """Checks that every id is in the model's vocabulary."""
    largest = max(token_ids, default=0)
    if largest >= model.vocab_size:
        raise InvalidRequest(
            f"token id {largest} is not in the vocabulary of {model.model}, which has "
            f"{model.vocab_size} tokens"
        )


def check_context_length(tokens: int, model: ModelInfo) -> None:
    """Checks that a context leaves room for a question token and an answer token."""
    if tokens < 1:
        raise InvalidRequest("the context is empty; send text or token ids")
    if tokens > model.max_positions - 2:
        raise InvalidRequest(
            f"the context has {tokens} tokens and {model.model} accepts {model.max_positions} "
            f"positions, two of them for a question and an answer: at most "
            f"{model.max_positions - 2}",
            reason="TOO_LONG",
        )


def answer_tokens(
    request: GenerateParams, context_tokens: int, prompt_tokens: int, model: ModelInfo, default: int
) -> int:
    """How many tokens to generate; raises InvalidRequest when they do not fit the model.

    The server's default shrinks to what fits; a number the client named does not.
    """
    if prompt_tokens < 1:
        raise InvalidRequest("the prompt is empty; give at least one token after the context")
    used = context_tokens + prompt_tokens
    left = model.max_positions - used
    wanted = request.max_tokens or 1
    if wanted > left:
        raise InvalidRequest(
            f"{context_tokens} context tokens + {prompt_tokens} prompt tokens + {wanted} to "
            f"generate = {used + wanted}, and {model.model} accepts {model.max_positions} "
            "positions: shorten the prompt or lower max_tokens",
            reason="TOO_LONG",
        )
    return request.max_tokens or min(default, left)


def choose_model(
    wanted: str, served: Mapping[str, ModelInfo], away: Collection[str] = ()
) -> ModelInfo:
    """The model a request means; an empty name means the only one that is served.

    `away` are models whose workers do not answer at the moment. Raises NotFound for a model that
    nobody serves, Unavailable while its workers are away, InvalidRequest without a name where
    several are served.
    """
    if wanted in served:
        return served[wanted]
    names = ", ".join(sorted(served)) or "none"
    if wanted and wanted not in away and served:
        raise NotFound(f"model {wanted!r} is not served; served: {names}", reason="NO_MODEL")
    if wanted or not served:
        raise Unavailable(
            f"no worker for {wanted or 'any model'} is alive (served now: {names}); try again, or "
            "start one with --coordinators pointing here",
            reason="NO_WORKER",
            retry_after_s=2.0,
        )
    if len(served) > 1:
        raise InvalidRequest(f"name the model; this cluster serves {names}")
    return next(iter(served.values()))
