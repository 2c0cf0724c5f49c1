"""How a generation ended: counts, times, work and bytes."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.generation import FinishReason, Generation
from coordinator.session_plan import Plan
from longreach.steps import ModelInfo, StepTiming
from longreach.types import WorkFigures, storage_dtype


@dataclass(frozen=True, slots=True)
class Summary:
    """How a generation ended. Times are seconds, measured here except for `steps`, which sums the
    worker's own times over the session's steps."""

    finish_reason: FinishReason
    context_tokens: int
    prompt_tokens: int
    completion_tokens: int
    queue_s: float
    open_s: float
    first_token_s: float
    per_token_s: float
    steps: StepTiming
    work: WorkFigures
    prompt_work: WorkFigures
    coverage: float
    resident_kv_bytes: int
    full_kv_bytes: int
    worker_id: str
    index_kinds: tuple[str, ...]
    failovers: int
    recomputed_tokens: int
    hedged_requests: int
    resumed: int


def summarise(
    plan: Plan,
    generation: Generation,
    *,
    arrived: float,
    queue_s: float,
    open_s: float,
    resident_kv_bytes: int,
    worker_id: str,
    index_kinds: tuple[str, ...],
    failovers: int,
) -> Summary:
    """The summary of a finished generation that arrived at `arrived` (monotonic seconds)."""
    assert generation.finish_reason is not None
    figures, record = generation.figures, plan.record
    later = generation.tokens - len(plan.params.generated) - 1
    spread_s = figures.last_token_at - figures.first_token_at
    tokens = record.context_stop + len(record.prompt_ids) + generation.tokens
    return Summary(
        finish_reason=generation.finish_reason,
        context_tokens=record.context_stop,
        prompt_tokens=len(record.prompt_ids),
        completion_tokens=generation.tokens,
        queue_s=queue_s,
        open_s=open_s,
        first_token_s=max(0.0, figures.first_token_at - arrived),
        per_token_s=spread_s / later if later > 0 else 0.0,
        steps=figures.steps,
        work=figures.work,
        prompt_work=figures.prompt_work,
        coverage=figures.coverage,
        resident_kv_bytes=resident_kv_bytes,
        full_kv_bytes=tokens * token_kv_bytes(plan.model),
        worker_id=worker_id,
        index_kinds=index_kinds,
        failovers=failovers,
        recomputed_tokens=generation.recomputed_tokens,
        hedged_requests=figures.hedged_requests,
        resumed=plan.params.resume.attempt if plan.params.resume else 0,
    )


def token_kv_bytes(model: ModelInfo) -> int:
    """Bytes of K and V of one token in every layer and KV head."""
    itemsize = storage_dtype(model.identity.dtype).itemsize
    return itemsize * sum(
        layer.kv_heads * (layer.head_dim + layer.value_dim) for layer in model.layers
    )
