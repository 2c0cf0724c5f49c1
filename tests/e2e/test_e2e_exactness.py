"""The whole cluster against the eager Hugging Face model, for every supported family.

Budget exact: prefill, question and 64 decode steps give the eager model's distribution at every
position, with four processes, two nodes, chunked prefill and offloaded KV in between.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from longreach.local_cluster import LocalCluster
from longreach.sdk import Generation
from tests.e2e.conftest import WORKER_FLAGS

pytestmark = pytest.mark.cluster

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3"]
CONTEXT_TOKENS = 700
NEW_TOKENS = 64
TOP = 20


def random_ids(count: int, vocab_size: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, vocab_size, (count,), generator=generator).tolist()


def eager_logprobs(directory: Path, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of the eager fp32 model after every position: [len(ids), vocab]."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def largest_difference(generation: Generation, expected: torch.Tensor) -> float:
    """Over every token drawn and its TOP likeliest ones: cluster's log-probability - eager's."""
    worst = 0.0
    for token, row in zip(generation.tokens, expected, strict=True):
        ids = torch.tensor([token_id for token_id, _ in token.alternatives])
        got = torch.tensor([logprob for _, logprob in token.alternatives])
        assert len(set(ids.tolist())) == TOP
        # The ids may differ where two tokens tie; their values may not.
        best = row.topk(TOP).values
        worst = max(worst, float((got - row[ids]).abs().max()), float((got - best).abs().max()))
    return worst


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exact_budget_gives_the_eager_models_distribution(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = tiny_model(family)
    with (
        LocalCluster(
            directory, nodes=2, data_dir=tmp_path, worker_flags=WORKER_FLAGS, tls=True
        ) as cluster,
        cluster.client(timeout_s=120) as client,
    ):
        vocab_size = AutoModelForCausalLM.from_pretrained(directory).config.vocab_size
        stored = random_ids(CONTEXT_TOKENS, vocab_size, seed=1)
        question = random_ids(9, vocab_size, seed=2)
        context = client.contexts.create(tokens=stored)
        generation = client.generate(
            question,
            context=context,
            max_tokens=NEW_TOKENS,
            budget="exact",
            logprobs=TOP,
            ignore_eos=True,
        )
    drawn = [token.id for token in generation.tokens]
    assert len(drawn) == NEW_TOKENS
    expected = eager_logprobs(directory, stored + question + drawn[:-1])[-NEW_TOKENS:]
    assert largest_difference(generation, expected) < 2e-3
    assert drawn == expected.argmax(-1).tolist()
    assert generation.coverage == 1.0
    assert generation.work.keys_attended == generation.work.keys_in_scope > 0
