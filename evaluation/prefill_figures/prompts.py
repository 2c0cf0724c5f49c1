"""Prompts of several tasks at one length, and the layers of a model over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evaluation.encoding import Encoder
from evaluation.tasks import TASKS, Spec
from gpu_worker.model import Model
from gpu_worker.pattern_search.capture import LayerTensors, visit_layers

TASK_NAMES = ("kv_retrieval", "niah_multikey_1", "vt", "niah_single_1", "passkey")
"""In the order in which prompts are taken; then the same with other contents."""

Prompt = tuple[str, tuple[int, ...]]
"""Name and token ids."""


def make_prompts(encoder: Encoder, tokens: int, count: int, seed: int = 0) -> list[Prompt]:
    """`count` prompts of exactly `tokens` tokens, questions included, of different tasks."""
    prompts = []
    for number in range(count):
        name = TASK_NAMES[number % len(TASK_NAMES)]
        spec = Spec(tokens, number // len(TASK_NAMES), seed, encoder)
        room = TASKS[name].samples(spec)[0].answer_tokens
        longer = Spec(tokens + room, spec.index, seed, encoder)
        sample = TASKS[name].samples(longer)[0]
        ids = (*sample.context_ids, *sample.question_ids)[-tokens:]
        prompts.append((f"{name} #{spec.index}", ids))
    return prompts


def each_layer(
    model: Model, prompts: Sequence[Prompt], visit: Callable[[str, LayerTensors], None]
) -> None:
    """Calls `visit` with the prompt's name for every layer of full attention of every prompt."""
    for name, ids in prompts:
        visit_layers(model, ids, lambda tensors, name=name: visit(name, tensors))  # type: ignore[misc]
