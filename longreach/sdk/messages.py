"""Requests built and replies parsed: pure functions that both clients share."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from longreach import wire
from longreach.errors import DeadlineExceeded, FailedPrecondition, Internal, InvalidRequest
from longreach.sdk import documents, models
from longreach.sdk.options import GenerateOptions
from longreach.types import Budget, SamplingParams
from longreach.v1 import generation_pb2 as pb

_STATES = {
    pb.CONTEXT_STATE_RESERVED: "reserved",
    pb.CONTEXT_STATE_FILLING: "filling",
    pb.CONTEXT_STATE_READY: "ready",
    pb.CONTEXT_STATE_UNAVAILABLE: "unavailable",
    pb.CONTEXT_STATE_FAILED: "failed",
    pb.CONTEXT_STATE_REPAIRING: "repairing",
}
_FINISH_REASONS = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}
_INDEX_POLL_S_MIN = 0.1
_INDEX_POLL_S_MAX = 1.0


class Content:
    """What a context is made of, and how; see `create_requests`. `repeatable`: it can be sent more
    than once, which an iterator cannot."""

    def __init__(self, **fields: Any) -> None:
        self._fields = fields
        self._first: Iterator[pb.CreateContextRequest] | None = create_requests(**fields)
        sources = (fields["text"], fields["tokens"])
        self.repeatable = not any(isinstance(each, Iterator) for each in sources)

    def requests(self) -> Iterator[pb.CreateContextRequest]:
        """The messages of one CreateContext call."""
        first, self._first = self._first, None
        return create_requests(**self._fields) if first is None else first


def create_requests(
    *,
    text: str | Iterable[str] | None,
    tokens: Iterable[int] | None,
    path: Any,
    name: str,
    model: str,
    placement: str,
    replicas: int = 0,
) -> Iterator[pb.CreateContextRequest]:
    """The messages of one CreateContext call; the content is read as the iterator advances.

    Raises InvalidRequest, at once unless exactly one of text, tokens and path is given, and from
    the iterator where the content is not valid.
    """
    given = [word for word, value in _named(text=text, tokens=tokens, path=path) if value]
    if len(given) != 1:
        raise InvalidRequest(
            "a context is created from exactly one of text, tokens and path; got "
            + (" and ".join(given) or "none")
        )
    options = pb.CreateContextOptions(
        model=model, name=name, placement=placement, replicas=replicas
    )
    return _create_messages(options, text, tokens, path)


def _named(**values: object) -> Iterator[tuple[str, bool]]:
    return ((word, value is not None) for word, value in values.items())


def _create_messages(
    options: pb.CreateContextOptions,
    text: str | Iterable[str] | None,
    tokens: Iterable[int] | None,
    path: Any,
) -> Iterator[pb.CreateContextRequest]:
    yield pb.CreateContextRequest(options=options)
    if tokens is not None:
        for ids in documents.token_pieces(tokens):
            yield pb.CreateContextRequest(tokens=pb.TokenIds(ids=ids))
        return
    pieces = documents.file_pieces(path) if text is None else documents.text_pieces(text)
    for piece in pieces:
        yield pb.CreateContextRequest(text=piece)


def context_id(context: models.Context | str | None) -> str:
    """The id of a context, of an id itself, or "" for none."""
    if context is None:
        return ""
    return context if isinstance(context, str) else context.id


def as_budget(budget: Budget | str | None) -> Budget | None:
    """A budget from its text form ("top_k=100"). Raises InvalidRequest."""
    if not isinstance(budget, str):
        return budget
    try:
        return Budget.parse(budget)
    except ValueError as error:
        raise InvalidRequest(str(error)) from None


def generate_request(prompt: str | Sequence[int], options: GenerateOptions) -> pb.GenerateRequest:
    """The request for a prompt of text or token ids. Raises InvalidRequest."""
    _require_ranges(options)
    budget = as_budget(options.budget)
    request = pb.GenerateRequest(
        model=options.model,
        context_id=context_id(options.context),
        sampling=wire.sampling_to_proto(
            SamplingParams(options.temperature, options.top_p, options.top_k, options.seed)
        ),
        max_tokens=options.max_tokens,
        stop_texts=[options.stop] if isinstance(options.stop, str) else list(options.stop),
        ignore_eos=options.ignore_eos,
        budget=None if budget is None else wire.budget_to_proto(budget),
        min_coverage=options.min_coverage,
        top_logprobs=options.logprobs,
        request_id=options.request_id,
    )
    if isinstance(prompt, str):
        request.text = "".join(documents.text_pieces(prompt))
    else:
        request.tokens.SetInParent()
        for ids in documents.token_pieces(prompt):
            request.tokens.ids.extend(ids)
    return request


def _require_ranges(options: GenerateOptions) -> None:
    """Ranges are checked here so that no value is cut to fit its field on the way."""
    limits: dict[str, tuple[float, float]] = {
        "max_tokens": (0, 2**32 - 1),
        "temperature": (0, 100),
        "top_p": (0, 1),
        "top_k": (0, 2**32 - 1),
        "seed": (0, 2**64 - 1),
        "min_coverage": (0, 1),
        "logprobs": (0, 2**32 - 1),
    }
    for name, (low, high) in limits.items():
        value = getattr(options, name)
        if not low <= value <= high:
            raise InvalidRequest(f"{name} is {value}; it must be in [{low:g}, {high:g}]")


def context_from_proto(message: pb.Context, *, found: bool = False) -> models.Context:
    """A context as the SDK shows it."""
    return models.Context(
        id=message.context_id,
        name=message.name,
        model=message.model,
        state=_STATES.get(message.state, "unknown"),
        tokens=message.tokens,
        kv_bytes=message.kv_bytes,
        prefill_fraction=message.prefill_fraction,
        index_fraction=message.index_fraction,
        index_kind=message.index_kind,
        index_bytes=message.index_bytes,
        created_at=message.created_at,
        prefill_s=message.prefill_s,
        shard_map=wire.shard_map_from_proto(message.shard_map),
        error=message.error,
        index_error=message.index_error,
        replicas=message.replicas,
        shards_under_replicated=message.shards_under_replicated,
        found=found,
    )


def finished_context(last: models.Context | None) -> models.Context:
    """The context a CreateContext stream ended with. Raises what kept it from becoming ready."""
    if last is None:
        raise Internal("the coordinator ended CreateContext without a reply; see its log")
    if not last.ready:
        raise FailedPrecondition(
            f"context {last.id} ended as {last.state}: {last.error or 'no reason given'}; "
            "see the coordinator's log, then create it again"
        )
    return last


def index_wait_s(context: models.Context, polls: int) -> float | None:
    """Seconds to wait before asking again whether the index is built; None when it is.

    Raises FailedPrecondition where it never will be.
    """
    if context.indexed:
        return None
    if context.state in ("failed", "unavailable"):
        raise FailedPrecondition(
            f"context {context.id} is {context.state}: {context.error or 'no reason given'}; "
            "its index cannot be waited for"
        )
    if context.index_error:
        raise FailedPrecondition(
            f"the index of context {context.id} was not built: {context.index_error}; "
            f"{context.index_kind or 'exact search'} goes on answering",
            reason="INDEX_FAILED",
        )
    return float(min(_INDEX_POLL_S_MAX, _INDEX_POLL_S_MIN * 1.25**polls))


class GenerationBuilder:
    """Collects the messages of a Generate stream into tokens and, at the end, a Generation."""

    def __init__(self) -> None:
        self._tokens: list[models.Token] = []
        self._generation: models.Generation | None = None

    def feed(self, message: pb.GenerateResponse) -> list[models.Token]:
        """Takes one message; returns the tokens it brought."""
        fresh = [_token_from_proto(each) for each in message.tokens]
        self._tokens += fresh
        if message.HasField("summary"):
            self._generation = _generation_from_proto(message, tuple(self._tokens))
        return fresh

    def finish(self) -> models.Generation:
        """The generation. Raises Internal when the stream ended without its summary."""
        if self._generation is None:
            raise Internal(
                f"the stream ended after {len(self._tokens)} tokens without a summary; "
                "see the coordinator's log"
            )
        return self._generation

    def summary(self) -> models.Generation:
        """The generation so far as it is complete. Raises FailedPrecondition before its end."""
        if self._generation is None:
            raise FailedPrecondition(
                f"the summary comes with the last token; {len(self._tokens)} tokens have come so "
                "far: read the stream to its end first"
            )
        return self._generation


def _token_from_proto(message: pb.GeneratedToken) -> models.Token:
    return models.Token(
        id=message.token_id,
        text=message.text,
        logprob=message.logprob,
        alternatives=tuple((each.token_id, each.logprob) for each in message.alternatives),
    )


def _generation_from_proto(
    message: pb.GenerateResponse, tokens: tuple[models.Token, ...]
) -> models.Generation:
    summary = message.summary
    return models.Generation(
        request_id=message.request_id,
        text="".join(token.text for token in tokens),
        tokens=tokens,
        finish_reason=_FINISH_REASONS.get(summary.finish_reason, "unknown"),
        usage=models.Usage(**_scalars(summary.usage)),
        timing=models.Timing(**_scalars(summary.timing)),
        work=wire.work_from_proto(summary.work),
        prompt_work=wire.work_from_proto(summary.prompt_work),
        coverage=summary.coverage,
        resident_kv_bytes=summary.resident_kv_bytes,
        full_kv_bytes=summary.full_kv_bytes,
        worker_id=summary.worker_id,
        index_kinds=tuple(summary.index_kinds),
        failovers=summary.failovers,
        recomputed_tokens=summary.recomputed_tokens,
        hedged_requests=summary.hedged_requests,
        resumed=summary.resumed,
    )


def _scalars(message: Any) -> dict[str, Any]:
    """Every field of a message of scalars, by name; our dataclasses use the same names."""
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}


def status_from_proto(message: pb.GetStatusResponse) -> models.Status:
    """The cluster's state as the SDK shows it."""
    return models.Status(
        members=tuple(_member_from_proto(each) for each in message.members),
        epoch=message.epoch,
        contexts=message.contexts,
        running=message.running,
        waiting=message.waiting,
        models=tuple(message.models),
        version=message.version,
        segments_under_replicated=message.segments_under_replicated,
        reprefill_tokens=message.reprefill_tokens,
    )


def _member_from_proto(message: pb.Member) -> models.Member:
    fields = _scalars(message)
    return models.Member(id=fields.pop("member_id"), **fields)


def index_timeout(context: models.Context, timeout_s: float) -> DeadlineExceeded:
    """The error of a wait for an index that took too long."""
    return DeadlineExceeded(
        f"the index of context {context.id} is {context.index_fraction:.0%} built after "
        f"{timeout_s:g} s; wait longer, or ask now: {context.index_kind or 'exact search'} answers"
    )


def traced(metadata: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """With the W3C trace context of the span under way, in applications that use OpenTelemetry."""
    if "opentelemetry.trace" not in sys.modules:
        return metadata
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return (*metadata, *carrier.items())


def call_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """Metadata of every call: the API key as a bearer token, where there is one."""
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)
