"""Prefill progress and decode steps, between coordinator and worker."""

from __future__ import annotations

from longreach.errors import InvalidRequest
from longreach.steps import (
    PrefillProgress,
    PrefillSummary,
    StepOutcome,
    StepRow,
    StepRowResult,
    StepTiming,
)
from longreach.v1 import worker_pb2
from longreach.wire.failures import error_from_proto, error_to_proto
from longreach.wire.session import work_from_proto, work_to_proto


def prefill_progress_to_proto(progress: PrefillProgress) -> worker_pb2.PrefillResponse:
    """Where a prefill stands."""
    summary = progress.summary
    return worker_pb2.PrefillResponse(
        layers_done=progress.layers_done,
        layers_total=progress.layers_total,
        tokens_done=progress.tokens_done,
        tokens_total=progress.tokens_total,
        fraction=progress.fraction,
        summary=None
        if summary is None
        else worker_pb2.PrefillSummary(
            compute_s=summary.compute_s,
            total_s=summary.total_s,
            offloaded_bytes=summary.offloaded_bytes,
            peak_device_bytes=summary.peak_device_bytes,
            checksums=summary.checksums,
        ),
    )


def prefill_progress_from_proto(msg: worker_pb2.PrefillResponse) -> PrefillProgress:
    """Where a prefill stands; `summary` only with the last message."""
    summary = None
    if msg.HasField("summary"):
        summary = PrefillSummary(
            compute_s=msg.summary.compute_s,
            total_s=msg.summary.total_s,
            offloaded_bytes=msg.summary.offloaded_bytes,
            peak_device_bytes=msg.summary.peak_device_bytes,
            checksums=dict(msg.summary.checksums),
        )
    return PrefillProgress(
        layers_done=msg.layers_done,
        layers_total=msg.layers_total,
        tokens_done=msg.tokens_done,
        tokens_total=msg.tokens_total,
        fraction=msg.fraction,
        summary=summary,
    )


def step_row_to_proto(row: StepRow) -> worker_pb2.StepRow:
    """Tokens of one session to feed in a step."""
    return worker_pb2.StepRow(
        session_id=row.session_id,
        position=row.position,
        token_ids=row.token_ids,
        sample=row.sample,
        top_logprobs=row.top_logprobs,
    )


def step_row_from_proto(msg: worker_pb2.StepRow) -> StepRow:
    """Tokens of one session to feed in a step; at least one, from a position of 0 or more."""
    if msg.position < 0 or not msg.token_ids:
        raise InvalidRequest(
            f"row of session {msg.session_id!r}: {len(msg.token_ids)} tokens at position "
            f"{msg.position}; a row feeds at least one token at position 0 or later"
        )
    return StepRow(
        session_id=msg.session_id,
        position=msg.position,
        token_ids=tuple(msg.token_ids),
        sample=msg.sample,
        top_logprobs=msg.top_logprobs,
    )


def step_result_to_proto(result: StepRowResult) -> worker_pb2.StepRowResult:
    """What became of a row."""
    return worker_pb2.StepRowResult(
        session_id=result.session_id,
        token_id=result.token_id,
        logprob=result.logprob,
        top_logprobs=[
            worker_pb2.TokenLogprob(token_id=token_id, logprob=logprob)
            for token_id, logprob in result.top_logprobs
        ],
        work=work_to_proto(result.work),
        coverage=result.coverage,
        acknowledged_stop=result.acknowledged_stop,
        error=None if result.error is None else error_to_proto(result.error),
        hedged_requests=result.hedged_requests,
        lagging_node_ids=result.lagging_node_ids,
    )


def step_result_from_proto(msg: worker_pb2.StepRowResult) -> StepRowResult:
    """What became of a row; `error` set when it failed."""
    return StepRowResult(
        session_id=msg.session_id,
        token_id=msg.token_id if msg.HasField("token_id") else None,
        logprob=msg.logprob,
        top_logprobs=tuple((each.token_id, each.logprob) for each in msg.top_logprobs),
        work=work_from_proto(msg.work),
        coverage=msg.coverage,
        acknowledged_stop=msg.acknowledged_stop,
        error=error_from_proto(msg.error) if msg.HasField("error") else None,
        hedged_requests=msg.hedged_requests,
        lagging_node_ids=tuple(msg.lagging_node_ids),
    )


def step_outcome_to_proto(outcome: StepOutcome, step_id: int = 0) -> worker_pb2.StepResponse:
    """Reply to the step with this number. Times travel in microseconds."""
    timing = outcome.timing
    return worker_pb2.StepResponse(
        step_id=step_id,
        results=[step_result_to_proto(result) for result in outcome.results],
        timing=worker_pb2.StepTiming(
            queue_us=microseconds(timing.queue_s),
            total_us=microseconds(timing.total_s),
            send_us=microseconds(timing.send_s),
            local_us=microseconds(timing.local_s),
            wait_us=microseconds(timing.wait_s),
            merge_us=microseconds(timing.merge_s),
            node_us=microseconds(timing.node_s),
            sample_us=microseconds(timing.sample_s),
        ),
    )


def step_outcome_from_proto(msg: worker_pb2.StepResponse) -> StepOutcome:
    """Reply to a step: results in the order of the rows, and where the time went."""
    timing = msg.timing
    return StepOutcome(
        results=tuple(step_result_from_proto(result) for result in msg.results),
        timing=StepTiming(
            queue_s=timing.queue_us / 1e6,
            total_s=timing.total_us / 1e6,
            send_s=timing.send_us / 1e6,
            local_s=timing.local_us / 1e6,
            wait_s=timing.wait_us / 1e6,
            merge_s=timing.merge_us / 1e6,
            node_s=timing.node_us / 1e6,
            sample_s=timing.sample_us / 1e6,
        ),
    )


def microseconds(seconds: float) -> int:
    """Seconds as whole microseconds that fit a uint32 (at most 71 minutes)."""
    return min(max(round(seconds * 1e6), 0), 2**32 - 1)
