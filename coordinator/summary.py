"""How a generation ended: counts, times, work and bytes."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.generation import FinishReason
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


def token_kv_bytes(model: ModelInfo) -> int:
    """Bytes of K and V of one token in every layer and KV head."""
    itemsize = storage_dtype(model.identity.dtype).itemsize
    return itemsize * sum(
        layer.kv_heads * (layer.head_dim + layer.value_dim) for layer in model.layers
    )
