"""This project's tokens, summaries and errors as OpenAI's objects.

The last object of an answer carries `longreach` beside OpenAI's fields: the four work figures,
coverage, and the times of the phases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coordinator.gateway.openai_requests import Completion, WrongField
from coordinator.generation import FinishReason, Token
from coordinator.summary import Summary
from longreach import errors
from longreach.errors import LongreachError

Json = dict[str, Any]

_FINISH = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
# The first class that an error is of decides.
_STATUS: tuple[tuple[type[LongreachError], int, str], ...] = (
    (errors.InvalidRequest, 400, "invalid_request_error"),
    (errors.Unauthenticated, 401, "authentication_error"),
    (errors.PermissionDenied, 403, "permission_error"),
    (errors.NotFound, 404, "not_found_error"),
    (errors.FailedPrecondition, 409, "conflict_error"),
    (errors.Aborted, 409, "conflict_error"),
    (errors.ResourceExhausted, 429, "rate_limit_error"),
    (errors.Cancelled, 499, "cancelled"),
    (errors.Unavailable, 503, "service_unavailable"),
    (errors.DeadlineExceeded, 504, "timeout"),
)
RETRY_AFTER_S = 1.0
"""For refusals that name no time."""


class Answer:
    """The objects of one answer, in the order of its stream."""

    def __init__(self, request: Completion, model: str, created: int) -> None:
        self._request = request
        self._chat = request.chat
        prefix = "chatcmpl" if request.chat else "cmpl"
        self._head: Json = {
            "id": f"{prefix}-{request.params.request_id}",
            "created": created,
            "model": model,
        }
        self._offset = 0

    def chunk(self, tokens: Sequence[Token], *, first: bool) -> Json:
        """Some tokens of a stream."""
        text = "".join(token.text for token in tokens)
        choice: Json = {"index": 0, "finish_reason": None, "logprobs": self._logprobs(tokens)}
        if self._chat:
            role = {"role": "assistant"} if first else {}
            choice["delta"] = role | {"content": text}
        else:
            choice["text"] = text
        return self._object([choice], stream=True)

    def last_chunk(self, summary: Summary) -> Json:
        """The end of a stream."""
        choice: Json = {"index": 0, "finish_reason": _FINISH[summary.finish_reason]}
        if self._chat:
            choice["delta"] = {}
        else:
            choice["text"] = ""
        return self._object([choice], stream=True) | {"longreach": _figures(summary)}

    def usage_chunk(self, summary: Summary) -> Json:
        """What `stream_options.include_usage` asks for."""
        return self._object([], stream=True) | {"usage": _usage(summary)}

    def whole(self, tokens: Sequence[Token], summary: Summary) -> Json:
        """An answer that is not streamed."""
        text = "".join(token.text for token in tokens)
        choice: Json = {
            "index": 0,
            "finish_reason": _FINISH[summary.finish_reason],
            "logprobs": self._logprobs(tokens),
        }
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        figures = {"usage": _usage(summary), "longreach": _figures(summary)}
        return self._object([choice], stream=False) | figures

    def _object(self, choices: list[Json], *, stream: bool) -> Json:
        kind = "text_completion"
        if self._chat:
            kind = "chat.completion.chunk" if stream else "chat.completion"
        return self._head | {"object": kind, "choices": choices}

    def _logprobs(self, tokens: Sequence[Token]) -> Json | None:
        """Log-probabilities in the shape of either API. Tokens are given as their own texts, which
        may be empty where a character is spread over several; alternatives as their ids, since
        their texts depend on what came before."""
        if not self._request.logprobs:
            return None
        if self._chat:
            return {"content": [_chat_logprob(token) for token in tokens]}
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {f"token_id:{token_id}": logprob for token_id, logprob in token.alternatives}
                for token in tokens
            ],
            "text_offset": offsets,
        }


def _chat_logprob(token: Token) -> Json:
    return {
        "token": token.text,
        "logprob": token.logprob,
        "bytes": list(token.text.encode()),
        "top_logprobs": [
            {"token": f"token_id:{token_id}", "logprob": logprob, "bytes": None}
            for token_id, logprob in token.alternatives
        ],
    }


def _usage(summary: Summary) -> Json:
    prompt = summary.context_tokens + summary.prompt_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": summary.completion_tokens,
        "total_tokens": prompt + summary.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": summary.context_tokens},
    }


def _figures(summary: Summary) -> Json:
    work = summary.work
    return {
        "coverage": summary.coverage,
        "scan_fraction": work.scan_fraction,
        "sketch_fraction": work.sketch_fraction,
        "attended_fraction": work.attended_fraction,
        "bytes_fraction": work.bytes_fraction,
        "queue_s": summary.queue_s,
        "open_s": summary.open_s,
        "first_token_s": summary.first_token_s,
        "per_token_s": summary.per_token_s,
        "worker_id": summary.worker_id,
        "index_kinds": list(summary.index_kinds),
    }


def model_object(name: str, created: int, max_tokens: int) -> Json:
    """An entry of /v1/models."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "longreach",
        "max_model_len": max_tokens,
    }


def error_object(error: LongreachError) -> tuple[int, Json, dict[str, str]]:
    """HTTP status, body and headers of an error."""
    status, kind = 500, "server_error"
    for known, number, name in _STATUS:
        if isinstance(error, known):
            status, kind = number, name
            break
    if error.reason == "TOO_LARGE":
        status = 413
    headers = {}
    if status in (429, 503):
        wait_s = RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        headers["Retry-After"] = str(max(1, round(wait_s)))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = {
        "message": error.message,
        "type": kind,
        "param": error.param if isinstance(error, WrongField) else None,
        "code": error.reason.lower(),
    }
    return status, {"error": body}, headers
