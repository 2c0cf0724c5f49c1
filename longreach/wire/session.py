"""Session records, sampling parameters, budgets and work figures."""

from __future__ import annotations

import math

import numpy as np

from longreach.errors import InvalidRequest
from longreach.types import Budget, SamplingParams, SessionRecord, WorkFigures
from longreach.v1 import common_pb2


def budget_to_proto(budget: Budget) -> common_pb2.Budget:
    """How many keys a query may use."""
    if budget.top_k is not None:
        return common_pb2.Budget(top_k=budget.top_k, tail_estimate=budget.tail_estimate)
    if budget.mass is not None:
        rule = common_pb2.MassRule(mass=budget.mass, floor=budget.floor, ceiling=budget.ceiling)
        return common_pb2.Budget(mass=rule, tail_estimate=budget.tail_estimate)
    if budget.beta is not None:
        return common_pb2.Budget(
            range=common_pb2.RangeRule(beta=budget.beta), tail_estimate=budget.tail_estimate
        )
    return common_pb2.Budget(all=True, tail_estimate=budget.tail_estimate)


def budget_from_proto(msg: common_pb2.Budget) -> Budget:
    """How many keys a query may use; raises InvalidRequest on no rule or a value out of range.

    Shares and betas travel as binary32 and are read back as the shortest decimal of that value,
    so that 0.98 is 0.98 again.
    """
    rule = msg.WhichOneof("rule")
    tail = msg.tail_estimate
    try:
        if rule == "top_k":
            return Budget(top_k=msg.top_k, tail_estimate=tail)
        if rule == "mass":
            return Budget(
                mass=_shortest(msg.mass.mass),
                floor=msg.mass.floor,
                ceiling=msg.mass.ceiling,
                tail_estimate=tail,
            )
        if rule == "range":
            return Budget(beta=_shortest(msg.range.beta), tail_estimate=tail)
        if rule == "all" and msg.all:
            return Budget(exact=True, tail_estimate=tail)
    except ValueError as error:
        raise InvalidRequest(f"budget: {error}") from None
    raise InvalidRequest("budget: no rule; set top_k, mass, range or all = true")


def work_to_proto(work: WorkFigures) -> common_pb2.WorkFigures:
    """Work done by retrieval."""
    return common_pb2.WorkFigures(
        keys_in_scope=work.keys_in_scope,
        keys_scanned=work.keys_scanned,
        keys_sketched=work.keys_sketched,
        keys_attended=work.keys_attended,
        bytes_read=work.bytes_read,
        bytes_in_scope=work.bytes_in_scope,
        keys_covered=work.keys_covered,
    )


def work_from_proto(msg: common_pb2.WorkFigures) -> WorkFigures:
    """Work done by retrieval."""
    return WorkFigures(
        msg.keys_in_scope,
        msg.keys_scanned,
        msg.keys_sketched,
        msg.keys_attended,
        msg.bytes_read,
        msg.bytes_in_scope,
        msg.keys_covered,
    )


def sampling_to_proto(sampling: SamplingParams) -> common_pb2.SamplingParams:
    """How tokens are drawn."""
    return common_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
    )


def sampling_from_proto(msg: common_pb2.SamplingParams) -> SamplingParams:
    """How tokens are drawn; temperature is finite and at least 0, top_p in [0, 1]."""
    temperature, top_p = _shortest(msg.temperature), _shortest(msg.top_p)
    if not 0 <= temperature < math.inf:
        raise InvalidRequest(f"temperature is {temperature}; it must be finite and 0 or more")
    if not 0 <= top_p <= 1:
        raise InvalidRequest(f"top_p is {top_p}; it must be in [0, 1], 0 switches it off")
    return SamplingParams(temperature, top_p, msg.top_k, msg.seed)


def session_record_to_proto(record: SessionRecord) -> common_pb2.SessionRecord:
    """Everything needed to resume a session."""
    return common_pb2.SessionRecord(
        session_id=record.session_id,
        context_id=record.context_id,
        context_stop=record.context_stop,
        tenant=record.tenant,
        epoch=record.epoch,
        prompt_ids=record.prompt_ids,
        sampling=sampling_to_proto(record.sampling),
        stop_ids=record.stop_ids,
        stop_texts=record.stop_texts,
        max_tokens=record.max_tokens,
        generated_ids=record.generated_ids,
        coordinator_id=record.coordinator_id,
    )


def session_record_from_proto(msg: common_pb2.SessionRecord) -> SessionRecord:
    """Everything needed to resume a session; it has an id, and a context exactly when it stops
    after position 0."""
    if not msg.session_id:
        raise InvalidRequest("session record: session_id is empty; the coordinator names sessions")
    if msg.context_stop < 0 or (msg.context_stop > 0 and not msg.context_id):
        raise InvalidRequest(
            f"session {msg.session_id!r}: context_stop {msg.context_stop} with context "
            f"{msg.context_id!r}; a session without a context has context_stop 0"
        )
    return SessionRecord(
        session_id=msg.session_id,
        context_id=msg.context_id,
        context_stop=msg.context_stop,
        tenant=msg.tenant,
        epoch=msg.epoch,
        prompt_ids=tuple(msg.prompt_ids),
        sampling=sampling_from_proto(msg.sampling),
        stop_ids=tuple(msg.stop_ids),
        stop_texts=tuple(msg.stop_texts),
        max_tokens=msg.max_tokens,
        generated_ids=tuple(msg.generated_ids),
        coordinator_id=msg.coordinator_id,
    )


def _shortest(value: float) -> float:
    """The shortest decimal that is the same binary32."""
    return float(str(np.float32(value)))
