"""One layer of one step: the whole control flow, in the order it happens.

1. send: the queries of every session leave for the nodes that hold this layer.
2. attend locally: sink, window and new tokens, while the nodes search.
3. collect: partial attention of the nodes.
4. merge: exact, by log-sum-exp (longreach.attention).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from gpu_worker.arrays import to_array
from gpu_worker.attention import LayerCall, Partial, apply_sinks, merge
from gpu_worker.methods.base import Retrieved, SessionQueries, Ticket
from longreach.attention import merge as merge_parts
from longreach.types import PartialAttention

if TYPE_CHECKING:
    from gpu_worker.step import Run, Step


def attend_layer(step: Step, layer: int, queries: torch.Tensor, call: LayerCall) -> torch.Tensor:
    """Attention of the step's queries [q_heads, T, d] at this layer; returns [T, q_heads, dv]."""
    rows = queries.transpose(0, 1)
    clock = step.clock
    started = time.perf_counter()
    asking = [] if call.sliding_window else [run for run in step.runs if run.asks_nodes]
    ticket = _send(step, layer, asking, rows, call) if asking else None
    sent = time.perf_counter()
    try:
        part = step.attend_locally(layer, rows, call)
    except BaseException:
        if ticket is not None:
            ticket.collect()  # Replies that nobody takes would count as in flight for ever.
        raise
    local = time.perf_counter()
    clock.send_s += sent - started
    clock.local_s += local - sent
    if ticket is not None:
        collected = ticket.collect()
        waited = time.perf_counter()
        part = merge(part, _assemble(step, asking, collected.answers, part))
        clock.wait_s += waited - local
        clock.merge_s += time.perf_counter() - waited
        clock.node_s += collected.slowest.total_s
    return apply_sinks(part, call.sinks)


def _send(step: Step, layer: int, asking: list[Run], rows: torch.Tensor, call: LayerCall) -> Ticket:
    on_host = to_array(rows)
    return step.retriever.send(
        layer,
        [
            SessionQueries(
                run.session.session_id, on_host[run.packed], run.scope, run.session.budget
            )
            for run in asking
        ],
        call.scale,
        call.softcap,
        step.deadline,
        step.trace.layer(layer) if step.trace else "",
    )


def _assemble(step: Step, asking: list[Run], answers: list[Retrieved], like: Partial) -> Partial:
    """The answers of all sessions as one partial attention; -inf where nothing was asked."""
    output = np.zeros(tuple(like.output.shape), np.float32)
    lse = np.full(tuple(like.lse.shape), -np.inf, np.float32)
    for run, answer in zip(asking, answers, strict=True):
        step.account(run, answer)
        seen: dict[tuple[int, int], PartialAttention] = {}
        for part in answer.parts:
            heads = (part.q_head_start, part.q_head_start + part.partial.lse.shape[1])
            before = seen.get(heads)
            seen[heads] = merge_parts([before, part.partial]) if before else part.partial
        for (start, stop), partial in seen.items():
            output[run.packed, start:stop] = partial.output
            lse[run.packed, start:stop] = partial.lse
    device = like.output.device
    return Partial(torch.from_numpy(output).to(device), torch.from_numpy(lse).to(device))
