"""Chunked prefill: the same logits, keys and values however it is cut; cancelled between chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache
from worker_models import (
    FAMILIES,
    assert_logits_equal,
    eager,
    eager_logits,
    random_model,
    random_tokens,
)

from gpu_worker.chunking import FixedChunks, sample_positions
from gpu_worker.model import Model
from gpu_worker.patterns import PATTERNS
from gpu_worker.prefill import PrefillJob
from longreach.errors import Cancelled
from longreach.types import FloatArray, IntArray, StorageArray

TOKENS = random_tokens(290)


class KeepingSink:
    """Keeps what a prefill sends."""

    def __init__(self) -> None:
        self.keys: dict[int, list[StorageArray]] = {}
        self.values: dict[int, list[StorageArray]] = {}
        self.starts: list[tuple[int, int]] = []
        self.queries: dict[int, StorageArray] = {}
        self.positions: dict[int, IntArray] = {}
        self.logits = torch.empty(0)

    def put(self, layer: int, start: int, keys: StorageArray, values: StorageArray) -> None:
        self.starts.append((layer, start))
        self.keys.setdefault(layer, []).append(keys)
        self.values.setdefault(layer, []).append(values)

    def put_queries(self, layer: int, positions: IntArray, queries: StorageArray) -> None:
        self.positions[layer], self.queries[layer] = positions, queries


def fp32(array: StorageArray) -> FloatArray:
    return np.asarray(array, np.float32)


def prefill(model: Model, chunk: int, tokens: tuple[int, ...] = TOKENS) -> KeepingSink:
    sink = KeepingSink()
    sink.logits = PrefillJob(tokens, model.layers, sink, FixedChunks(chunk)).run(
        model.module, model.device
    )
    return sink


@pytest.mark.parametrize("chunk", [64, 128, 4096])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_eager_attention_for_any_chunk(family: str, chunk: int) -> None:
    model = random_model(family)
    want = eager_logits(model, TOKENS)[-1]
    assert_logits_equal(prefill(model, chunk).logits, want)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_keys_and_values_are_those_of_transformers_own_cache(family: str) -> None:
    model = random_model(family)
    cache = DynamicCache()
    ids = torch.tensor([TOKENS])
    eager(model, lambda module: module(input_ids=ids, past_key_values=cache, use_cache=True))
    sink = prefill(model, 128)
    for layer in range(len(model.layers)):
        keys, values = cache.layers[layer].keys[0], cache.layers[layer].values[0]
        np.testing.assert_allclose(np.concatenate(sink.keys[layer], 1), keys, atol=2e-5)
        np.testing.assert_allclose(np.concatenate(sink.values[layer], 1), values, atol=2e-5)


def test_layers_come_one_after_another_and_chunks_in_order() -> None:
    sink = prefill(random_model("llama"), 128)
    assert sink.starts == [(layer, start) for layer in range(3) for start in (0, 128, 256)]


def test_queries_are_sampled_for_searched_layers_only() -> None:
    model = random_model("gemma2")
    sink = prefill(model, 64)
    assert list(sink.queries) == [1]
    assert sink.queries[1].shape == (4, len(sample_positions(290)), 16)
    assert np.array_equal(sink.positions[1], sample_positions(290))


def test_sampled_queries_attend_as_the_model_does() -> None:
    """The sample of layer 0 gives layer 0's attention, seen through the keys that were sent."""
    model = random_model("llama")
    sink, whole = prefill(model, 64), prefill(model, 4096)
    for layer in range(3):
        np.testing.assert_allclose(fp32(sink.queries[layer]), fp32(whole.queries[layer]), atol=2e-5)
    attention = model.module.model.layers[0].self_attn
    hidden = model.module.model.layers[0].input_layernorm(
        model.module.model.embed_tokens(torch.tensor([TOKENS]))
    )
    # Rope turns pairs but keeps lengths, so sampled queries have the projections' norms.
    norms = attention.q_proj(hidden)[0].reshape(290, 4, -1).norm(dim=-1)[sink.positions[0]]
    np.testing.assert_allclose(
        np.linalg.norm(sink.queries[0], axis=-1).T, norms.detach(), rtol=1e-4
    )


def test_one_buffer_serves_all_layers() -> None:
    model = random_model("llama")
    job = PrefillJob(TOKENS, model.layers, KeepingSink(), FixedChunks(64))
    job.run(model.module, model.device)
    assert len(job._buffers) == 1
    ((keys, values),) = job._buffers.values()
    assert keys.shape == values.shape == (2, 290, 16)


def test_the_last_layer_works_for_the_last_chunk_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama")
    last = model.module.model.layers[-1]
    rows: list[int] = []
    inner = last.mlp.forward

    def counting(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(hidden.shape[1])
        return inner(hidden)

    monkeypatch.setattr(last.mlp, "forward", counting)
    prefill(model, 4096)
    assert rows == [290 - 256]


@pytest.mark.parametrize("at", [(0, 0), (1, 128), (2, 256)])
def test_a_prefill_is_cancelled_between_two_chunks_and_the_next_one_is_whole(
    at: tuple[int, int],
) -> None:
    model = random_model("llama")
    want = prefill(model, 128).logits
    sink = KeepingSink()

    def point(layer: int, tokens_done: int) -> bool:
        if (layer, tokens_done) == at:
            raise Cancelled("the caller went away")
        return False

    job = PrefillJob(TOKENS, model.layers, sink, FixedChunks(128), point)
    with pytest.raises(Cancelled):
        job.run(model.module, model.device)
    assert len(sink.starts) == at[0] * 3 + at[1] // 128
    assert torch.equal(prefill(model, 128).logits, want)


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65])
def test_short_prompts_are_prefilled_too(tokens: int) -> None:
    model = random_model("qwen3")
    want = eager_logits(model, TOKENS[:tokens])[-1]
    assert_logits_equal(prefill(model, 64, TOKENS[:tokens]).logits, want)


FULL: dict[str, dict[str, Any]] = {
    "a_shape": {"sink_tokens": 64, "window_tokens": 512},
    "block_sparse": {"top_blocks": 100},
    "vertical_slash": {"verticals": 1000, "slashes": 1000},
    "adaptive": {"min_share": 0.0, "dense_below": 0, "dense_first_rows": 0},
}
SPARSE: dict[str, dict[str, Any]] = {
    "a_shape": {"sink_tokens": 64, "window_tokens": 64},
    "vertical_slash": {"verticals": 30, "slashes": 100},
}


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt-oss"])
@pytest.mark.parametrize("name", sorted(FULL))
def test_a_pattern_that_leaves_nothing_out_is_dense_attention(name: str, family: str) -> None:
    model = random_model(family)
    pattern = PATTERNS[name](**FULL[name])
    job = PrefillJob(TOKENS, model.layers, KeepingSink(), FixedChunks(128), pattern=pattern)
    assert_logits_equal(job.run(model.module, model.device), eager_logits(model, TOKENS)[-1])
    # Only layers of full attention without a softcap are served by the pattern.
    assert (job.pairs_visible > 0) == (family != "gemma2")


@pytest.mark.parametrize("name", sorted(SPARSE))
def test_a_sparse_prefill_sends_each_layer_once_and_counts_its_density(name: str) -> None:
    model = random_model("llama")
    pattern = PATTERNS[name](**SPARSE[name])
    tokens = random_tokens(900)
    results = {}
    for chunk in (128, 1024):
        sink = KeepingSink()
        job = PrefillJob(tokens, model.layers, sink, FixedChunks(chunk), pattern=pattern)
        results[chunk] = job.run(model.module, model.device)
        assert len(set(sink.starts)) == len(sink.starts)
        assert [sum(k.shape[1] for k in sink.keys[layer]) for layer in range(3)] == [900] * 3
        assert 0 < job.pairs_attended < job.pairs_visible
    assert_logits_equal(results[128], results[1024])


@pytest.mark.parametrize("pattern", [None, "a_shape", "vertical_slash"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_span_computed_again_after_stored_kv_is_what_it_was(
    family: str, pattern: str | None
) -> None:
    model = random_model(family)
    chosen = None if pattern is None else PATTERNS[pattern]()
    whole = KeepingSink()
    job = PrefillJob(TOKENS, model.layers, whole, FixedChunks(128), pattern=chosen)
    logits = job.run(model.module, model.device)
    keys = {layer: np.concatenate(parts, 1) for layer, parts in whole.keys.items()}
    values = {layer: np.concatenate(parts, 1) for layer, parts in whole.values.items()}
    asked: list[int] = []

    def earlier(layer: int) -> tuple[StorageArray, StorageArray]:
        asked.append(layer)
        return keys[layer][:, :128], values[layer][:, :128]

    again = KeepingSink()
    job = PrefillJob(
        TOKENS, model.layers, again, FixedChunks(128), pattern=chosen, start=128, earlier=earlier
    )
    assert_logits_equal(job.run(model.module, model.device), logits)
    assert asked == list(range(len(model.layers)))
    for layer in range(len(model.layers)):
        assert again.starts[0] == (0, 128)
        np.testing.assert_allclose(
            np.concatenate(again.keys[layer], 1), keys[layer][:, 128:], atol=2e-5
        )
        np.testing.assert_allclose(
            np.concatenate(again.values[layer], 1), values[layer][:, 128:], atol=2e-5
        )
        if layer in again.queries:
            assert again.positions[layer].min() >= 128
            at = whole.positions[layer] >= 128
            np.testing.assert_allclose(again.queries[layer], whole.queries[layer][:, at], atol=2e-5)
