"""Sessions: one generation each, from its plan to the last token.

    plan ─> wait for a slot ─> open on the worker ─> decode loop ─> close

Each session runs in a task of its own, so that a client that goes away at any point only cancels
that task, which leaves the loop at a step boundary and closes the session on worker and nodes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable

from coordinator.admission import Admission, WorkerSlots
from coordinator.catalog.base import ContextRecord
from coordinator.cluster import Cluster
from coordinator.config import CoordinatorConfig
from coordinator.contexts import Contexts
from coordinator.driver import Driver, WorkerPeer
from coordinator.generation import Generation, Token
from coordinator.holdings import without_tenant
from coordinator.models import Models
from coordinator.orphans import Orphans, SessionNames
from coordinator.pacing import QuestionPace
from coordinator.requests import GenerateParams
from coordinator.scheduler import DecodeLoop
from coordinator.session_plan import Plan, Planner
from coordinator.summary import Summary, summarise
from coordinator.tokenizer import Detokenizer
from longreach.errors import Cancelled, Internal, LongreachError, Unavailable

# A worker that does not close a session in this time is lost, or about to be found lost.
CLOSE_TIMEOUT_S = 5.0
# A session that hangs in a frozen worker does not hold up the deletion of its context.
ABORT_TIMEOUT_S = 10.0
# Pauses between attempts to open a session.
OPEN_PAUSES_S = (0.3, 0.9)
_log = logging.getLogger(__name__)


class _Session:
    """A running generation: its events for the client and the task that drives it."""

    def __init__(self, plan: Plan, arrived: float) -> None:
        self.plan = plan
        self.arrived = arrived
        self.queue_s = 0.0
        self.open_s = 0.0
        self.resident_bytes = 0
        self.events: asyncio.Queue[Token | Summary | LongreachError] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None
        self.cancelled = False

    def cancel(self, error: LongreachError | None = None) -> None:
        """Ends the session at the next step boundary, once: a second cancellation would cut its
        clean-up short."""
        if error is not None:
            self.events.put_nowait(error)
        if self.task is not None and not self.cancelled:
            self.cancelled = True
            self.task.cancel()


class Sessions:
    """Every generation of this coordinator."""

    def __init__(
        self,
        cluster: Cluster,
        driver: Driver,
        contexts: Contexts,
        models: Models,
        config: CoordinatorConfig,
        on_lost: Callable[[str, LongreachError], None],
    ) -> None:
        self._cluster = cluster
        self._driver = driver
        self._contexts = contexts
        self._config = config
        self._on_lost = on_lost
        self._admission = Admission(self._slots, config.max_waiting)
        names = SessionNames(config.name)
        self._planner = Planner(contexts, models, self._admission, config, names)
        self.orphans = Orphans(names, driver, lives=lambda session_id: session_id in self._sessions)
        self._loops: dict[str, tuple[WorkerPeer, DecodeLoop]] = {}
        self._sessions: dict[str, _Session] = {}

    @property
    def running(self) -> int:
        """Generations that hold a worker's slot."""
        return self._admission.running

    @property
    def waiting(self) -> int:
        """Generations that wait for one."""
        return self._admission.waiting

    async def generate(
        self, params: GenerateParams
    ) -> AsyncGenerator[tuple[Token, ...] | Summary, None]:
        """Tokens as they come, then a summary; closing early cancels the generation.

        Raises what went wrong: InvalidRequest, NotFound, ResourceExhausted, Unavailable, ...
        """
        arrived = time.monotonic()
        session = _Session(await self._planner.plan(params), arrived)
        session_id = session.plan.record.session_id
        self._sessions[session_id] = session
        session.task = asyncio.create_task(self._run(session))
        session.task.add_done_callback(lambda _: self._gone(session))
        end: Summary | LongreachError | None = None
        try:
            while end is None:
                tokens, end = _drain(session.events, await session.events.get())
                if tokens:
                    yield tokens
        finally:
            if end is None:
                session.cancel()
        if isinstance(end, LongreachError):
            raise end
        yield end

    async def abort_context(self, context_id: str, error: LongreachError) -> None:
        """Ends every generation on a context; waits until they are closed, but not forever."""
        found = [s for s in self._sessions.values() if s.plan.record.context_id == context_id]
        for session in found:
            session.cancel(error)
        tasks = [session.task for session in found if session.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=ABORT_TIMEOUT_S)

    def members_changed(self) -> None:
        """Workers came: whoever waits may go on."""
        self._admission.grant()

    def worker_down(self, worker_id: str, error: LongreachError) -> None:
        """A worker is gone: its sessions end with the error."""
        entry = self._loops.pop(worker_id, None)
        if entry is not None:
            entry[1].fail(error)

    async def drain(self, grace_s: float) -> None:
        """Admits nothing more; running generations may finish within the grace, then are cut."""
        self._admission.close("the coordinator is shutting down; ask another, or try again later")
        tasks = {s.task for s in self._sessions.values() if s.task is not None}
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=grace_s)
        cut = Unavailable("the coordinator shut down before the generation ended")
        for session in list(self._sessions.values()):
            session.cancel(cut)
        if late:
            await asyncio.wait(late)

    async def _run(self, session: _Session) -> None:
        plan = session.plan
        try:
            asked = time.monotonic()
            prefer = self._contexts.last_worker(plan.record.context_id)
            worker_id = await self._admission.acquire(without_tenant(plan.identity), prefer)
            granted = time.monotonic()
            session.queue_s = granted - asked
            try:
                summary = await self._serve(session, worker_id)
            finally:
                self._admission.release(worker_id, time.monotonic() - granted)
            # Last of all: who has the summary may rely on nothing being left behind.
            session.events.put_nowait(summary)
        except LongreachError as error:
            session.events.put_nowait(error)
        except Exception as problem:
            _log.exception("session %s failed", plan.record.session_id)
            session.events.put_nowait(
                Internal(f"the generation failed with {type(problem).__name__}")
            )

    async def _serve(self, session: _Session, worker_id: str) -> Summary:
        plan = session.plan
        worker = self._driver.worker(worker_id)
        began = time.monotonic()
        opening = asyncio.create_task(self._open(session, worker))
        try:
            stop, session.resident_bytes = await asyncio.shield(opening)
            session.open_s = time.monotonic() - began
            if plan.context is not None:
                self._contexts.used_by(plan.context.context_id, worker_id)
            generation = _generation(plan, stop)
            loop = self._loop(worker_id, worker)
            await loop.run(generation, session.events.put_nowait)
            return summarise(
                plan,
                generation,
                arrived=session.arrived,
                queue_s=session.queue_s,
                open_s=session.open_s,
                resident_kv_bytes=session.resident_bytes,
                worker_id=worker_id,
                index_kinds=await self._index_kinds(plan.context),
            )
        finally:
            if not await _close(worker, opening, plan.record.session_id):
                self.orphans.left(plan.record.session_id)

    async def _open(self, session: _Session, worker: WorkerPeer) -> tuple[int, int]:
        """Opens the session on the worker; tries again when a node does not answer, since one that
        has just come back refuses connections for a moment."""
        plan = session.plan
        for pause_s in (*OPEN_PAUSES_S, None):
            try:
                return await worker.open_session(
                    plan.record,
                    plan.identity,
                    plan.shard_map,
                    self._driver.read_capability(plan.record),
                    plan.budget,
                    plan.params.min_coverage or 1.0,
                )
            except Unavailable:
                if pause_s is None or session.cancelled:
                    raise
                await asyncio.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")

    async def _index_kinds(self, context: ContextRecord | None) -> tuple[str, ...]:
        if context is None:
            return ()
        try:
            kind = (await self._contexts.view(context.context_id)).index.kind
        except LongreachError:
            return ()
        return tuple(kind.split("+")) if kind else ()

    def _loop(self, worker_id: str, worker: WorkerPeer) -> DecodeLoop:
        """The worker's decode loop; a worker that moved gets a new one."""
        known = self._loops.get(worker_id)
        if known is not None and known[0] is worker:
            return known[1]
        member = self._cluster.member(worker_id)
        status = member.report.worker if member else None
        limit = status.max_row_tokens if status else self._config.question_tokens_per_step
        loop = DecodeLoop(
            worker,
            max_row_tokens=max(1, limit),
            pace=QuestionPace(
                self._config.question_tokens_per_step, self._config.question_step_ms / 1e3
            ),
            on_lost=lambda error: self._on_lost(worker_id, error),
        )
        self._loops[worker_id] = (worker, loop)
        return loop

    def _slots(self) -> list[WorkerSlots]:
        return [
            WorkerSlots(
                member.member_id,
                member.report.worker.model.identity,
                member.report.worker.max_sessions,
            )
            for member in self._cluster.workers()
            if member.report.worker
        ]

    def _gone(self, session: _Session) -> None:
        self._sessions.pop(session.plan.record.session_id, None)
        # Behind whatever ended it; read only where a task was cancelled before it began.
        session.events.put_nowait(Cancelled("the generation was cancelled"))


def _generation(plan: Plan, stop: int) -> Generation:
    record = plan.record
    if stop != record.context_stop:
        raise Internal(
            f"the worker opened session {record.session_id} at position {stop}; the context ends "
            f"at {record.context_stop}"
        )
    detokenizer = Detokenizer(plan.tokenizer, record.prompt_ids) if plan.tokenizer else None
    return Generation(
        record.session_id,
        position=stop,
        question=record.prompt_ids,
        max_tokens=record.max_tokens,
        stop_ids=record.stop_ids,
        stop_texts=record.stop_texts,
        top_logprobs=plan.params.top_logprobs,
        detokenizer=detokenizer,
    )


def _drain(
    events: asyncio.Queue[Token | Summary | LongreachError],
    event: Token | Summary | LongreachError,
) -> tuple[tuple[Token, ...], Summary | LongreachError | None]:
    """Tokens that are there already, and the end if it is."""
    tokens: list[Token] = []
    while isinstance(event, Token):
        tokens.append(event)
        if events.empty():
            return tuple(tokens), None
        event = events.get_nowait()
    return tuple(tokens), event


async def _close(
    worker: WorkerPeer, opening: asyncio.Task[tuple[int, int]], session_id: str
) -> bool:
    """Closes a session on its worker and nodes, once its opening has ended either way.

    Whether the worker answered: it may be gone, and then the nodes still have the session.
    """
    await asyncio.wait([opening])
    if not opening.cancelled():
        opening.exception()  # raised already where it matters
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await worker.close_session(session_id, True)
    except (LongreachError, TimeoutError) as error:
        _log.warning("session %s was not closed on its worker: %r", session_id, error)
        return False
    return True
