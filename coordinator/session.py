"""A running generation, as the sessions of a coordinator hold it."""

from __future__ import annotations

import asyncio
import dataclasses

from coordinator.failover import Course, Healing
from coordinator.generation import Generation, Token
from coordinator.request_metrics import RequestMetrics
from coordinator.request_trace import RequestTrace
from coordinator.scheduler import DecodeLoop
from coordinator.session_plan import Plan
from coordinator.summary import Summary
from coordinator.tokenizer import Detokenizer
from longreach.errors import LongreachError, StaleEpoch


class Session:
    """A running generation: its events for the client and the task that drives it.

    `record` is that of the plan under the epoch of the current attempt, `loop` the decode loop it
    sits in. A session that was `superseded` leaves its nodes to whoever took it over.
    """

    def __init__(
        self,
        plan: Plan,
        course: Course,
        arrived: float,
        metrics: RequestMetrics,
        trace: RequestTrace | None,
    ) -> None:
        self.plan = plan
        self.trace = trace
        self.metrics = metrics
        self.course = course
        self.arrived = arrived
        self.record = plan.record
        self.shard_map = plan.shard_map
        self.healing = Healing()
        self.generation = _generation(plan)
        self.queue_s = 0.0
        self.open_s = 0.0
        self.resident_bytes = 0
        self.worker_id = ""
        self.holds_slot = False
        self.loop: DecodeLoop | None = None
        self.events: asyncio.Queue[Token | Summary | LongreachError] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None
        self.cancelled = False
        self.superseded = False
        self.may_be_open = False

    @property
    def session_id(self) -> str:
        """Unique in the cluster."""
        return self.record.session_id

    @property
    def traceparent(self) -> str:
        """The span of the request; empty where it is not traced."""
        return self.trace.traceparent if self.trace is not None else ""

    @property
    def resumed(self) -> int:
        """Earlier attempts of the client, at other coordinators."""
        return self.plan.params.resume.attempt if self.plan.params.resume else 0

    def take(self, token: Token) -> None:
        """A token for the client."""
        self.metrics.token(self.generation.figures.last_token_at, self.queue_s)
        self.events.put_nowait(token)

    def cancel(self, error: LongreachError | None = None) -> None:
        """Ends the session at the next step boundary, once: a second cancellation would cut its
        clean-up short."""
        if error is not None:
            self.events.put_nowait(error)
        if self.task is not None and not self.cancelled:
            self.cancelled = True
            self.task.cancel()

    def supersede(self) -> None:
        """Ends the session because a later attempt of its client has come."""
        self.superseded = True
        self.cancel(StaleEpoch(f"session {self.session_id} goes on in a later attempt"))

    def next_epoch(self) -> None:
        """Makes the next attempt fence off the one before."""
        self.record = dataclasses.replace(
            self.record,
            epoch=self.record.epoch + 1,
            generated_ids=self.generation.generated_ids,
        )


def _generation(plan: Plan) -> Generation:
    record = plan.record
    detokenizer = Detokenizer(plan.tokenizer, record.prompt_ids) if plan.tokenizer else None
    return Generation(
        record.session_id,
        position=record.context_stop,
        question=record.prompt_ids,
        max_tokens=record.max_tokens,
        stop_ids=record.stop_ids,
        stop_texts=record.stop_texts,
        top_logprobs=plan.params.top_logprobs,
        detokenizer=detokenizer,
        generated=record.generated_ids,
    )
