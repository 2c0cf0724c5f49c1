"""Sessions: one generation each, from its plan to the last token.

    plan ─> wait for a slot ─> open on the worker ─> decode loop ─> close
                 ^                                       │
                 └── worker or nodes lost, a newer epoch ┘

Each session runs in a task of its own, so that a client that goes away at any point only cancels
that task, which leaves the loop at a step boundary and closes the session on worker and nodes. What
is decided when a worker or a node is lost is in `coordinator/failover.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable

from coordinator import request_metrics
from coordinator.admission import Admission, WorkerSlots
from coordinator.catalog.base import ContextRecord
from coordinator.cluster import Cluster, MemberState
from coordinator.config import CoordinatorConfig
from coordinator.contexts import Contexts
from coordinator.driver import Driver, WorkerPeer
from coordinator.failover import Course
from coordinator.generation import Token
from coordinator.holdings import without_tenant
from coordinator.models import Models
from coordinator.orphans import Orphans, SessionNames
from coordinator.pacing import QuestionPace
from coordinator.request_metrics import Objectives, RequestMetrics
from coordinator.request_trace import RequestTrace
from coordinator.requests import GenerateParams
from coordinator.scheduler import DecodeLoop, SteppedAside
from coordinator.session import Session
from coordinator.session_plan import Plan, Planner
from coordinator.summary import Summary, summarise
from longreach.errors import (
    Cancelled,
    FailedPrecondition,
    Internal,
    LongreachError,
    Unavailable,
)
from longreach.telemetry import scope, tracing
from longreach.types import ShardMap

# A worker that does not close a session in this time is lost, or about to be found lost.
CLOSE_TIMEOUT_S = 5.0
# A session that hangs in a frozen worker does not hold up the deletion of its context.
ABORT_TIMEOUT_S = 10.0
# A node that reported within this time is not frozen: members report every second.
WELL_WITHIN_S = 1.5
# How long an earlier attempt of the same client may take to leave.
SUPERSEDE_TIMEOUT_S = 2.0
_log = logging.getLogger(__name__)


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
        on_left: Callable[[], None] = lambda: None,
    ) -> None:
        self._cluster = cluster
        self._driver = driver
        self._contexts = contexts
        self._config = config
        self._on_lost = on_lost
        self._on_left = on_left
        self._admission = Admission(self._slots, config.max_waiting)
        self._objectives = Objectives(config.objective_ttft_s, config.objective_itl_s)
        names = SessionNames(config.name, config.cluster_secret.encode())
        self._planner = Planner(contexts, models, self._admission, config, names)
        self.orphans = Orphans(names, driver, lives=lambda session_id: session_id in self._sessions)
        self._loops: dict[str, tuple[WorkerPeer, DecodeLoop]] = {}
        self._sessions: dict[str, Session] = {}

    @property
    def running(self) -> int:
        """Generations that hold a worker's slot."""
        return self._admission.running

    def running_models(self) -> Counter[str]:
        """Generations that hold a worker's slot, by model."""
        return Counter(s.plan.model.model for s in self._sessions.values() if s.holds_slot)

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
        trace = RequestTrace.begin(params)
        ended = False
        try:
            async with contextlib.aclosing(self._generate(params, trace)) as events:
                async for event in events:
                    ended = isinstance(event, Summary)
                    yield event
        except BaseException as error:
            if not ended:  # whoever has the summary may close at once
                request_metrics.failed(error)
                if trace is not None:
                    trace.failed(error)
            raise

    async def _generate(
        self, params: GenerateParams, trace: RequestTrace | None
    ) -> AsyncGenerator[tuple[Token, ...] | Summary, None]:
        arrived = time.monotonic()
        parent = trace.traceparent if trace is not None else ""
        with scope.entered(parent, request_id=params.request_id), tracing.part("plan", parent):
            plan = await self._planner.plan(params)
        if trace is not None:
            trace.planned(plan)
        await self._end_earlier_attempt(plan)
        metrics = RequestMetrics(
            plan.model.model, arrived, self._objectives, resumed=bool(params.generated)
        )
        course = Course(self._config.failover_patience_s)
        session = Session(plan, course, arrived, metrics, trace)
        self._sessions[session.session_id] = session
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
        metrics.finished(end, time.monotonic())
        if trace is not None:
            trace.finished(plan, end)
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
        """Workers came: whoever waits may go on, and who sits on one that leaves may move."""
        self._admission.grant()
        for member in self._cluster.members():
            if member.state is MemberState.LEAVING and member.report.worker:
                self._hand_over(member.member_id)

    def route_changed(self, context_id: str) -> None:
        """The shard map of a context changed: copies were made, moved or dropped.

        Its sessions are opened anew over the new map, each at its next step boundary, where they
        continue from what their nodes hold; nodes that are new to them get a copy of their tails.
        """
        for session in self._sessions.values():
            if context_id and session.record.context_id == context_id:
                self._set_aside(session)

    def heal(self) -> None:
        """Opens sessions anew that lost nodes which are well again; called every now and then."""
        now = time.monotonic()
        well = {
            member.member_id
            for member in self._cluster.nodes()
            if now - member.seen_at < WELL_WITHIN_S
        }
        for session in self._sessions.values():
            lagging = session.generation.lagging_node_ids
            if session.loop is not None and session.healing.due(lagging, well, now):
                self._set_aside(session)

    def _hand_over(self, worker_id: str) -> None:
        """Has the sessions of a worker that leaves go on elsewhere, if there is another."""
        for session in self._sessions.values():
            identity = without_tenant(session.plan.identity)
            if session.worker_id == worker_id and any(
                slots.identity == identity and slots.worker_id != worker_id
                for slots in self._slots()
            ):
                self._set_aside(session)

    @staticmethod
    def _set_aside(session: Session) -> None:
        if session.loop is not None:
            session.loop.set_aside(session.session_id)

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
        cut = Unavailable(
            "the coordinator shut down before the generation ended", reason="DRAINING"
        )
        for session in list(self._sessions.values()):
            session.cancel(cut)
        if late:
            await asyncio.wait(late)

    async def _end_earlier_attempt(self, plan: Plan) -> None:
        """Ends what this coordinator still drives under the id of a client's new attempt."""
        earlier = self._sessions.get(plan.record.session_id)
        if earlier is None:
            return
        if earlier.record.epoch >= plan.record.epoch:
            raise FailedPrecondition(
                f"session {plan.record.session_id} runs under epoch {earlier.record.epoch} already;"
                " give every generation a resume key of its own, and every attempt a higher number",
                reason="ALREADY_RUNNING",
            )
        earlier.supersede()
        if earlier.task is not None:
            await asyncio.wait([earlier.task], timeout=SUPERSEDE_TIMEOUT_S)

    async def _run(self, session: Session) -> None:
        scope.enter(
            session.traceparent,
            request_id=session.plan.params.request_id,
            session_id=session.session_id,
            context_id=session.record.context_id,
        )
        try:
            try:
                if session.generation.finish_reason is None:
                    await self._drive(session)
            finally:
                session.metrics.ended(session.generation)
                self._leave_nothing(session)
            summary = await self._summary(session)
            _log.info(
                "generation ended (%s): %d tokens, the first after %.3f s, then %.4f s each",
                *(summary.finish_reason.name.lower(), summary.completion_tokens),
                *(summary.first_token_s, summary.per_token_s),
            )
            # Last of all: who has the summary may rely on nothing being left behind.
            session.events.put_nowait(summary)
        except LongreachError as error:
            session.events.put_nowait(error)
        except Exception as problem:
            _log.exception("session %s failed", session.session_id)
            session.events.put_nowait(
                Internal(f"the generation failed with {type(problem).__name__}")
            )

    async def _drive(self, session: Session) -> None:
        """Feeds the generation until it ends, on one worker after another where need be."""
        prefer = self._contexts.last_worker(session.record.context_id)
        while True:
            with tracing.part("wait for a slot", session.traceparent):
                worker_id = await self._slot(session, prefer)
            granted = time.monotonic()
            session.holds_slot = True
            pause_s: float | None = None
            try:
                await self._serve(session, worker_id)
                return
            except SteppedAside:
                session.course.moved()
                pause_s, prefer = 0.0, worker_id
            except LongreachError as error:
                generation, now = session.generation, time.monotonic()
                pause_s = session.course.failed(error, worker_id, generation.position, now)
                if pause_s is None:
                    raise
                prefer = worker_id
                _log.warning("session %s goes on elsewhere: %s", session.session_id, error)
            finally:
                session.holds_slot = False
                self._admission.release(worker_id, time.monotonic() - granted)
                if pause_s is None:
                    await self._close(session, worker_id)
                else:
                    self.orphans.behind(worker_id, session.session_id, session.record.epoch)
                    self._on_left()
            session.metrics.failed_over()
            await asyncio.sleep(pause_s)
            session.next_epoch()

    async def _slot(self, session: Session, prefer: str) -> str:
        """A worker's slot: in turn for a new generation, at once for one that goes on."""
        identity = without_tenant(session.plan.identity)
        course, asked = session.course, time.monotonic()
        try:
            if not course.failovers:
                return await self._admission.acquire(identity, prefer)
            async with asyncio.timeout(course.left_s(asked)):
                return await self._admission.acquire_again(identity, prefer, course.avoid)
        except TimeoutError:
            raise course.out_of_patience() from None
        finally:
            session.queue_s += time.monotonic() - asked

    async def _serve(self, session: Session, worker_id: str) -> None:
        """Opens the session on a worker and feeds it until it ends or has to leave."""
        worker = self._driver.worker(worker_id)
        session.worker_id, session.may_be_open = worker_id, True
        began = time.monotonic()
        opening = asyncio.ensure_future(self._open(session, worker))
        try:
            stop, session.resident_bytes = await asyncio.shield(opening)
        except asyncio.CancelledError:
            # What it opens can be closed only once it is open.
            await asyncio.wait([opening])
            opening.cancelled() or opening.exception()
            raise
        session.open_s += time.monotonic() - began
        if session.plan.context is not None:
            self._contexts.used_by(session.plan.context.context_id, worker_id)
        session.generation.stand_at(stop, self._window(worker_id))
        session.loop = self._loop(worker_id, worker)
        try:
            await session.loop.run(session.generation, session.take, session.trace)
        finally:
            session.loop = None

    async def _open(self, session: Session, worker: WorkerPeer) -> tuple[int, int]:
        plan, record = session.plan, session.record
        session.shard_map = self._shard_map(session)
        with tracing.part("open session", session.traceparent):
            return await worker.open_session(
                record,
                plan.identity,
                session.shard_map,
                self._driver.read_capability(record),
                plan.budget,
                plan.params.min_coverage or 1.0,
            )

    def _shard_map(self, session: Session) -> ShardMap:
        """Where the session's KV lives now. A tail without a context is placed anew when a node of
        it that has no copy is gone: its tokens are known."""
        if session.plan.context is not None:
            return self._contexts.shard_map(session.record.context_id) or session.shard_map
        members = {member.member_id for member in self._cluster.members() if member.reachable}
        if all(members.intersection(shard.node_ids) for shard in session.shard_map.shards):
            return self._cluster.readdress(session.shard_map)
        tokens = len(session.record.prompt_ids) + session.record.max_tokens
        return self._contexts.place_tail(session.session_id, session.plan.model, tokens)

    async def _close(self, session: Session, worker_id: str) -> None:
        """Closes a session on its worker and nodes."""
        worker, on_nodes = self._driver.worker(worker_id), not session.superseded
        if await _closed(worker, session.session_id, session.record.epoch, on_nodes):
            # Elsewhere it may be open still where it was before.
            session.may_be_open = bool(session.course.failovers or session.resumed)

    def _leave_nothing(self, session: Session) -> None:
        """Has closed in the background what could not be closed on the way."""
        if session.may_be_open and not session.superseded:
            self.orphans.left(session.session_id, session.record.epoch)
            self._on_left()

    async def _summary(self, session: Session) -> Summary:
        return summarise(
            session.plan,
            session.generation,
            arrived=session.arrived,
            queue_s=session.queue_s,
            open_s=session.open_s,
            resident_kv_bytes=session.resident_bytes,
            worker_id=session.worker_id,
            index_kinds=await self._index_kinds(session.plan.context),
            failovers=session.course.failovers,
        )

    def _window(self, worker_id: str) -> int:
        member = self._cluster.member(worker_id)
        status = member.report.worker if member else None
        return status.window_tokens if status else 0

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

    def _gone(self, session: Session) -> None:
        if self._sessions.get(session.session_id) is session:
            del self._sessions[session.session_id]
        # Behind whatever ended it; read only where a task was cancelled before it began.
        session.events.put_nowait(Cancelled("the generation was cancelled"))


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


async def _closed(worker: WorkerPeer, session_id: str, epoch: int, on_nodes: bool) -> bool:
    """Closes a session on its worker and, when asked, on its nodes.

    Whether all of them said so: where one is gone or silent, it may be open there still.
    """
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            return await worker.close_session(session_id, on_nodes, epoch)
    except (LongreachError, TimeoutError) as error:
        _log.warning("session %s was not closed on its worker: %r", session_id, error)
        return False
