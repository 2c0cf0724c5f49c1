"""Continuous batching: one decode loop per worker.

Each step carries one row of every session that is decoding and, within a limit, question rows of
the others. Sessions join and leave between steps. The next step is made when the last one has
answered, because it needs its tokens.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from coordinator.failover import WORKER_LOST
from coordinator.generation import Generation, Token
from coordinator.pacing import QuestionPace
from coordinator.request_trace import RequestTrace, begin_step, end_step
from longreach.errors import DeadlineExceeded, Internal, LongreachError, Unavailable
from longreach.steps import StepOutcome, StepRow, StepRowResult, WorkerStatus

# A step may take long, on a slow device or with a long question. When it does, the worker is asked
# for its status, which it answers beside the step: one that is frozen or cut off does not.
LOOK_AFTER_S = 0.5
LOOK_TIMEOUT_S = 0.75
# Longest that a step may take on a worker that answers.
STEP_S_MAX = 300.0
_log = logging.getLogger(__name__)

OnToken = Callable[[Token], None]


class StepRunner(Protocol):
    """What a decode loop needs of a worker."""

    async def step(self, rows: Sequence[StepRow], *, traceparent: str = "") -> StepOutcome:
        """Runs one step; raises Unavailable when the worker is lost. `traceparent` names the span
        of a step that is traced."""

    async def status(self) -> WorkerStatus:
        """What the worker holds; answered while a step runs."""


class SteppedAside(Exception):
    """A session left the loop at a step boundary because it was asked to go on elsewhere."""


class _Seat:
    """A session in the loop. `left` resolves at a step boundary: no row of it is in flight."""

    def __init__(
        self, generation: Generation, on_token: OnToken, trace: RequestTrace | None
    ) -> None:
        self.generation = generation
        self.on_token = on_token
        self.trace = trace
        self.leaving = False
        self.aside = False
        self.left: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class DecodeLoop:
    """Runs the steps of one worker while it has sessions.

    `max_row_tokens` is the worker's limit on one row, `pace` the limit on all question rows of a
    step. `on_lost` is told when a step failed as a whole.
    """

    def __init__(
        self,
        worker: StepRunner,
        *,
        max_row_tokens: int,
        pace: QuestionPace,
        on_lost: Callable[[LongreachError], None] = lambda error: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._worker = worker
        self._max_row_tokens = max_row_tokens
        self._pace = pace
        self._on_lost = on_lost
        self._clock = clock
        self._seats: dict[str, _Seat] = {}
        self._task: asyncio.Task[None] | None = None

    async def run(
        self, generation: Generation, on_token: OnToken, trace: RequestTrace | None = None
    ) -> None:
        """Feeds a generation until it finishes; raises what ended it otherwise.

        Cancelling leaves the loop at the next step boundary, then raises CancelledError.
        """
        seat = _Seat(generation, on_token, trace)
        self._seats[generation.session_id] = seat
        if self._task is None:
            # The loop outlives this session: it must not seem to be its work in logs.
            self._task = asyncio.create_task(self._steps(), context=contextvars.Context())
        try:
            await asyncio.shield(seat.left)
        except asyncio.CancelledError:
            seat.leaving = True
            await asyncio.wait([seat.left])
            raise

    def set_aside(self, session_id: str) -> None:
        """Makes a session leave at the next step boundary; its `run` raises SteppedAside."""
        seat = self._seats.get(session_id)
        if seat is not None:
            seat.leaving = seat.aside = True

    def fail(self, error: LongreachError) -> None:
        """Ends every session with an error at once, without waiting for the step in flight."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        for seat in list(self._seats.values()):
            self._leave(seat, error)

    async def _steps(self) -> None:
        try:
            while self._seats:
                rows = self._gather()
                if rows:
                    outcome = await self._traced_step(rows)
                    self._dispatch(rows, outcome)
                for seat in [s for s in self._seats.values() if s.leaving]:
                    self._leave(seat, SteppedAside() if seat.aside else None)
            self._task = None
        except (Unavailable, DeadlineExceeded) as error:
            self._lost(Unavailable(error.message, reason=WORKER_LOST, retry_after_s=1.0))
        except LongreachError as error:
            self._lost(error)
        except Exception as problem:
            _log.exception("the decode loop failed")
            self._lost(Internal(f"the decode loop failed with {type(problem).__name__}"))

    async def _traced_step(self, rows: dict[str, StepRow]) -> StepOutcome:
        """One step, with a span where one of its generations is traced."""
        asked = list(rows.values())
        traces = [trace for name in rows if (trace := self._seats[name].trace) is not None]
        span = begin_step(traces, asked) if traces else None
        if span is None:
            return await self._step(asked)
        outcome: StepOutcome | None = None
        try:
            outcome = await self._step(asked, span.traceparent)
            return outcome
        finally:
            end_step(span, outcome)

    async def _step(self, rows: Sequence[StepRow], traceparent: str = "") -> StepOutcome:
        """One step; raises Unavailable when the worker does not answer."""
        step = asyncio.ensure_future(self._worker.step(rows, traceparent=traceparent))
        give_up = self._clock() + STEP_S_MAX
        try:
            while not (await asyncio.wait([step], timeout=LOOK_AFTER_S))[0]:
                if self._clock() > give_up:
                    raise Unavailable(f"the worker did not end a step within {STEP_S_MAX:g} s")
                await self._look(step)
            return step.result()
        finally:
            step.cancel()

    async def _look(self, step: asyncio.Future[StepOutcome]) -> None:
        """Raises Unavailable unless the worker answers; an end of the step is an answer."""
        looking = asyncio.ensure_future(self._worker.status())
        waited: list[asyncio.Future[Any]] = [step, looking]
        done, _ = await asyncio.wait(
            waited, timeout=LOOK_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        looking.cancel()
        if not done:
            raise Unavailable(
                f"the worker answered neither a step nor a status within "
                f"{LOOK_AFTER_S + LOOK_TIMEOUT_S:g} s"
            )
        if looking in done:
            looking.result()

    def _lost(self, error: LongreachError) -> None:
        self._task = None
        for seat in list(self._seats.values()):
            self._leave(seat, error)
        self._on_lost(error)

    def _gather(self) -> dict[str, StepRow]:
        """The rows of the next step: every decoder, and questions within the limit, in turn."""
        rows: dict[str, StepRow] = {}
        questions_left = self._pace.tokens(sum(s.generation.decoding for s in self._seats.values()))
        for name, seat in list(self._seats.items()):
            if seat.leaving:
                continue
            if seat.generation.decoding:
                rows[name] = seat.generation.next_row(1)
            elif questions_left > 0:
                row = seat.generation.next_row(min(self._max_row_tokens, questions_left))
                questions_left -= len(row.token_ids)
                rows[name] = row
                self._seats[name] = self._seats.pop(name)  # served: the others go first next time
        return rows

    def _dispatch(self, rows: dict[str, StepRow], outcome: StepOutcome) -> None:
        questions = [r for n, r in rows.items() if not self._seats[n].generation.decoding]
        self._pace.observe(sum(len(r.token_ids) for r in questions), outcome.timing.total_s)
        results = {result.session_id: result for result in outcome.results}
        now = self._clock()
        for name, row in rows.items():
            seat = self._seats[name]
            result = results.get(name) or StepRowResult(
                name, error=Internal(f"the worker's reply has no row for session {name}")
            )
            try:
                token = seat.generation.accept(row, result, outcome.timing, now)
            except LongreachError as error:
                self._leave(seat, error)
                continue
            if token is not None:
                seat.on_token(token)
            if seat.generation.finish_reason is not None:
                self._leave(seat)

    def _leave(self, seat: _Seat, error: Exception | None = None) -> None:
        self._seats.pop(seat.generation.session_id, None)
        if seat.left.done():
            return
        if error is None:
            seat.left.set_result(None)
        else:
            seat.left.set_exception(error)
            seat.left.exception()  # read by `run`, unless its caller was cancelled meanwhile
