"""A prefill holds O(prompt x hidden) and one layer's KV, counted allocation by allocation."""

from __future__ import annotations

from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile
from worker_models import random_model, random_tokens

from gpu_worker.chunking import FixedChunks
from gpu_worker.model import Model
from gpu_worker.patterns import PATTERNS
from gpu_worker.patterns.base import Pattern
from gpu_worker.prefill import PrefillJob
from longreach.types import IntArray, StorageArray

CHUNK = 128
HIDDEN_BYTES = 64 * 4
LAYER_KV_BYTES = 2 * 2 * 16 * 4  # K and V of 2 heads of 16, fp32


class ForgettingSink:
    """Takes KV and keeps nothing, as one that has sent it."""

    def put(self, layer: int, start: int, keys: StorageArray, values: StorageArray) -> None:
        pass

    def put_queries(self, layer: int, positions: IntArray, queries: StorageArray) -> None:
        pass


def peak_bytes(model: Model, tokens: int, pattern: Pattern | None = None) -> int:
    """Highest sum of what torch's allocator gave out and has not got back, during one prefill."""
    job = PrefillJob(
        random_tokens(tokens), model.layers, ForgettingSink(), FixedChunks(CHUNK), pattern=pattern
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        job.run(model.module, model.device)
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        held += nbytes
        peak = max(peak, held)
    assert changes, "torch's profiler reported no allocation"
    return peak


PATTERN_OF: dict[str, Pattern | None] = {
    "dense": None,
    "a_shape": PATTERNS["a_shape"](sink_tokens=64, window_tokens=128),
    "vertical_slash": PATTERNS["vertical_slash"](verticals=64, slashes=128),
    "adaptive": PATTERNS["adaptive"](dense_below=0, dense_first_rows=0, max_keys=128),
}
WORKING_BYTES = {
    # Per prompt token, while one chunk of 128 rows is attended, beside one more hidden state for
    # ids, positions and rotary tables: block masks in every sparse pattern; the keys of 4 heads in
    # fp32 and some arrays of 64 rows of probabilities in vertical_slash's probe; scores of 2 pooled
    # queries and their shares in adaptive.
    "dense": 0,
    "a_shape": LAYER_KV_BYTES,
    "vertical_slash": 4 * (64 * 4 * 6 + 16 * 4),
    "adaptive": 4 * LAYER_KV_BYTES,
}


@pytest.mark.parametrize("name", list(PATTERN_OF))
def test_memory_grows_with_the_prompt_by_hidden_states_and_one_layers_kv(name: str) -> None:
    model = random_model("llama")
    peak_bytes(model, 256, PATTERN_OF[name])  # What torch allocates once and keeps.
    short, long = (peak_bytes(model, tokens, PATTERN_OF[name]) for tokens in (1024, 3072))
    per_token = (long - short) / (3072 - 1024)
    kept = HIDDEN_BYTES + LAYER_KV_BYTES
    assert kept <= per_token <= kept + HIDDEN_BYTES + WORKING_BYTES[name]


def test_memory_does_not_depend_on_the_number_of_layers() -> None:
    few, many = (random_model("llama", num_hidden_layers=layers) for layers in (2, 6))
    peak_bytes(few, 256)
    difference = peak_bytes(many, 2048) - peak_bytes(few, 2048)
    # Four more layers' KV would be 8 times this.
    assert difference < 2048 * LAYER_KV_BYTES / 2
