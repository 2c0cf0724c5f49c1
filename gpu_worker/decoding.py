"""Decode steps: rows of many sessions in, tokens out. Runs on the thread that owns the device.

A session moves only when its rows succeeded: its length is committed, its new KV leaves for the
nodes. A row that is refused or fails costs its own session nothing and the others nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch

from gpu_worker.appends import Appends, LayerKv, NewTokens
from gpu_worker.arrays import to_array
from gpu_worker.methods.base import Retriever
from gpu_worker.model import Model
from gpu_worker.resident import LocalSlab
from gpu_worker.sampling import MAX_TOP_LOGPROBS, Drawn, sample
from gpu_worker.session import Session
from gpu_worker.step import Run, Step
from gpu_worker.step_trace import StepTrace
from longreach import telemetry
from longreach.errors import (
    FailedPrecondition,
    Internal,
    InvalidRequest,
    LongreachError,
    NotFound,
    StaleEpoch,
)
from longreach.steps import StepOutcome, StepRow, StepRowResult, StepTiming
from longreach.types import Span

log = logging.getLogger(__name__)
_STEP_SECONDS = telemetry.histogram("step_seconds").bind()
_STEP_ROWS = telemetry.counter("step_rows").bind()


class Decoder:
    """The open sessions of a worker and the steps that move them.

    `step_deadline_s` bounds the wait for nodes in one step, `append_timeout_s` the wait for their
    acknowledgement of positions that leave the window.
    """

    def __init__(
        self,
        model: Model,
        slab: LocalSlab,
        retriever: Retriever,
        appends: Appends,
        *,
        step_deadline_s: float = 30.0,
        append_timeout_s: float = 5.0,
    ) -> None:
        self._model = model
        self._slab = slab
        self._retriever = retriever
        self._appends = appends
        self._step_deadline_s = step_deadline_s
        self._append_timeout_s = append_timeout_s
        self.sessions: dict[str, Session] = {}

    def step(self, rows: Sequence[StepRow], trace: StepTrace | None = None) -> StepOutcome:
        """Feeds the rows in one forward pass; results in their order, errors in the results."""
        started = time.perf_counter()
        results: dict[int, StepRowResult] = {}
        runs: dict[int, Run] = {}
        for number, row in enumerate(rows):
            try:
                if any(run.session.session_id == row.session_id for run in runs.values()):
                    raise InvalidRequest(f"session {row.session_id!r} has two rows in one step")
                runs[number] = self._admit(row)
            except LongreachError as error:
                results[number] = self._refusal(row.session_id, error)
        timing = StepTiming()
        if runs:
            timing = self._run(rows, runs, results, started, trace)
            _STEP_SECONDS.record(timing.total_s)
            _STEP_ROWS.add(sum(len(run.token_ids) for run in runs.values()))
        return StepOutcome(tuple(results[i] for i in range(len(rows))), timing)

    def _admit(self, row: StepRow) -> Run:
        session = self.sessions.get(row.session_id)
        if session is None:
            raise NotFound(
                f"session {row.session_id!r} is not open on this worker; open it first",
                reason="UNKNOWN_SESSION",
            )
        if session.broken is not None:
            raise session.broken
        self._check(row, session)
        session.last_used = time.monotonic()
        run = Run(session, tuple(row.token_ids), session.scope(self._slab.sink, self._slab.window))
        self._require_tail(run)
        return run

    def _check(self, row: StepRow, session: Session) -> None:
        count, info = len(row.token_ids), self._model.info
        if row.position != session.length:
            raise FailedPrecondition(
                f"the row begins at position {row.position}, session {row.session_id!r} stands at "
                f"{session.length}; continue there",
                reason="WRONG_POSITION",
            )
        if not 1 <= count <= self._slab.max_row_tokens:
            raise InvalidRequest(
                f"the row has {count} tokens; a row has 1 to {self._slab.max_row_tokens}, send a "
                "long question in several steps"
            )
        if row.position + count > info.max_positions:
            raise InvalidRequest(
                f"the row ends at position {row.position + count}; model {info.model!r} accepts "
                f"{info.max_positions}",
                reason="TOO_LONG",
            )
        check_tokens(row.token_ids, info.vocab_size)
        if not 0 <= row.top_logprobs <= MAX_TOP_LOGPROBS:
            raise InvalidRequest(
                f"top_logprobs is {row.top_logprobs}; it must be 0 to {MAX_TOP_LOGPROBS}"
            )

    def _require_tail(self, run: Run) -> None:
        """What leaves the window with this row must be on the nodes."""
        session = run.session

        def window(span: Span) -> LayerKv:
            return [
                (to_array(keys), to_array(values))
                for keys, values in (
                    self._slab.take(layer, session.slot, span)
                    for layer in range(len(self._slab.layers))
                )
            ]

        needed = run.scope.stop if len(run.scope) else 0
        try:
            self._appends.require(
                session.session_id, needed, session.length, window, self._append_timeout_s
            )
        except StaleEpoch as error:
            session.broken = error
            raise

    def _run(
        self,
        rows: Sequence[StepRow],
        runs: dict[int, Run],
        results: dict[int, StepRowResult],
        started: float,
        trace: StepTrace | None,
    ) -> StepTiming:
        deadline = time.monotonic() + self._step_deadline_s
        step = Step(tuple(runs.values()), self._slab, self._retriever, deadline, trace)
        logits = self._forward(step)
        forwarded = time.perf_counter()
        wanted = {runs[i].session.session_id: rows[i] for i in runs}
        drawn = self._sample(step, logits, wanted) if logits is not None else {}
        sampled = time.perf_counter()
        self._commit(step)
        for number, run in runs.items():
            results[number] = self._result(run, drawn.get(run.session.session_id))
        clock = step.clock
        return StepTiming(
            total_s=time.perf_counter() - started,
            send_s=clock.send_s,
            local_s=clock.local_s,
            wait_s=clock.wait_s,
            merge_s=clock.merge_s,
            node_s=clock.node_s,
            sample_s=sampled - forwarded,
        )

    def _forward(self, step: Step) -> torch.Tensor | None:
        """Logits [runs, vocab]; None, with the reason in every run, when the pass failed."""
        try:
            logits = step.forward(self._model)
        except Exception as error:
            log.exception("a step of %d sessions failed", len(step.runs))
            failure = Internal(f"the forward pass failed with {type(error).__name__}: {error}")
            for run in step.runs:
                run.error = error if isinstance(error, LongreachError) else failure
            return None
        finite = torch.isfinite(logits).all(-1).tolist()
        for run, fine in zip(step.runs, finite, strict=True):
            if not fine and run.error is None:
                run.error = Internal(
                    f"the model gave NaN or infinite logits at position {run.span.stop - 1}"
                )
        return logits

    def _sample(
        self, step: Step, logits: torch.Tensor, wanted: dict[str, StepRow]
    ) -> dict[str, Drawn]:
        """Tokens of the runs that asked for one, by session id."""
        chosen = [
            (place, run)
            for place, run in enumerate(step.runs)
            if run.error is None and wanted[run.session.session_id].sample
        ]
        if not chosen:
            return {}
        drawn = sample(
            logits[[place for place, _ in chosen]],
            [run.session.record.sampling for _, run in chosen],
            [run.span.stop for _, run in chosen],
            [wanted[run.session.session_id].top_logprobs for _, run in chosen],
        )
        return {run.session.session_id: each for (_, run), each in zip(chosen, drawn, strict=True)}

    def _commit(self, step: Step) -> None:
        """Moves the sessions that succeeded and sends their KV to the nodes."""
        moved = [run for run in step.runs if run.error is None]
        if not moved:
            return
        kv = step.new_arrays()
        self._appends.submit(
            [
                NewTokens(run.session.session_id, run.span.start, run.token_ids, kv, run.packed)
                for run in moved
            ]
        )
        for run in moved:
            run.session.length = run.span.stop

    def _refusal(self, session_id: str, error: LongreachError) -> StepRowResult:
        session = self.sessions.get(session_id)
        stop = self._acknowledged(session) if session else 0
        return StepRowResult(session_id, acknowledged_stop=stop, error=error)

    def _acknowledged(self, session: Session) -> int:
        return min(self._appends.acknowledged(session.session_id), session.length)

    def _result(self, run: Run, drawn: Drawn | None) -> StepRowResult:
        session = run.session
        acknowledged = self._acknowledged(session)
        if run.error is not None:
            if isinstance(run.error, StaleEpoch):
                session.broken = run.error
            return StepRowResult(
                session.session_id,
                work=run.work,
                coverage=run.coverage,
                acknowledged_stop=acknowledged,
                error=run.error,
                hedged_requests=run.hedged_requests,
            )
        return StepRowResult(
            session.session_id,
            token_id=drawn.token_id if drawn else None,
            logprob=drawn.logprob if drawn else 0.0,
            top_logprobs=drawn.top_logprobs if drawn else (),
            work=run.work,
            coverage=run.coverage,
            acknowledged_stop=acknowledged,
            hedged_requests=run.hedged_requests,
            lagging_node_ids=self._appends.lagging(session.session_id),
        )


def check_tokens(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidRequest for a token id outside the vocabulary."""
    for token in token_ids:
        if not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"token id {token} is outside the model's vocabulary of {vocab_size}",
                reason="UNKNOWN_TOKEN",
            )
