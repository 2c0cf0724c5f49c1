"""Bytes of every tier, held to the published figure and to what the services really allocate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coordinator.config import CoordinatorConfig
from gpu_worker.config import WorkerConfig
from gpu_worker.resident import LocalSlab
from longreach.planning import memory
from longreach.planning.memory import Resident, device_bytes, node_bytes, step_bytes
from longreach.planning.shapes import ModelShape, load_shape
from longreach.types import LayerGeometry
from retrieval_node import config as node_config
from retrieval_node.index import sketch_fit

LLAMA = load_shape("llama-3-8b")
MIXED = ModelShape(
    "mixed",
    (LayerGeometry(0, 8, 2, 64, 64), LayerGeometry(1, 8, 2, 64, 64, sliding_window=1024)),
    128,
    384,
    10_000,
    "float32",
)


def test_512k_tokens_of_an_8b_model_take_the_slides_62_gib() -> None:
    """MInference's slides: storing 512K tokens requires 62 GB."""
    assert node_bytes(LLAMA, 512_000, 1, 1, 0).contexts / 2**30 == pytest.approx(62.5)


@pytest.mark.parametrize(("sink", "window", "row"), [(128, 512, 512), (64, 100, 1), (0, 700, 300)])
def test_resident_bytes_are_those_the_worker_allocates(sink: int, window: int, row: int) -> None:
    resident = Resident(sink, window, row, max_sessions=3)
    slab = LocalSlab(
        MIXED.layers,
        slots=3,
        sink=sink,
        window=window,
        max_row_tokens=row,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    planned = device_bytes(MIXED, 10_000, 3, resident).resident_kv
    assert planned == 3 * slab.bytes_per_slot


def test_the_constants_are_the_services_own() -> None:
    worker = WorkerConfig()
    assert Resident() == Resident(
        worker.sink_tokens, worker.window_tokens, worker.max_row_tokens, worker.max_sessions
    )
    assert CoordinatorConfig(cluster_secret="x").index_reserve == memory.INDEX_RESERVE
    assert node_config._SHARE_OF_MEMORY == memory.NODE_MEMORY_SHARE
    # A format is (groups of 4 dimensions with a byte each, groups of 8 with half a byte each).
    assert max(4 * eight + 4 * four for eight, four in sketch_fit.FORMATS) == memory.CODE_BYTES


def test_a_sketch_index_takes_no_more_than_planned() -> None:
    random = np.random.default_rng(0)
    layer = LayerGeometry(0, 2, 1, 64, 64)
    keys = random.standard_normal((2048, 64)).astype(np.float32)
    fitted = sketch_fit.fit_sketch(keys, keys, None, format=sketch_fit.FORMATS[-1])
    planned = 2048 * memory.index_token_bytes(layer)
    assert fitted.codes.nbytes + fitted.summaries.nbytes <= planned


def test_room_is_what_the_coordinator_asks_for() -> None:
    needed = node_bytes(LLAMA, 1000, contexts=3, sessions=2, tail_tokens=10)
    per_token = 32 * 8 * (128 + 128) * 2
    assert needed.contexts == 3 * 1000 * per_token
    assert needed.tails == 2 * 10 * per_token
    assert needed.room == int(needed.contexts * 1.25) + needed.tails
    assert needed.indexes < 0.25 * needed.contexts


def test_sliding_layers_are_stored_but_not_indexed_or_searched() -> None:
    needed = node_bytes(MIXED, 100, 1, 0, 0)
    assert needed.contexts == 100 * 2 * 2 * 128 * 4
    assert needed.indexes == 100 * 2 * (32 + 2)
    step = step_bytes(MIXED)
    assert (step.queries, step.answers) == (8 * 64 * 4, 8 * 65 * 4)


def test_a_worker_holds_one_layer_while_it_prefills_not_all() -> None:
    """Hidden states and one layer's KV of 1M tokens, against 122 GiB of KV in full."""
    device = device_bytes(LLAMA, 10**6, 1, Resident(max_sessions=1))
    one_layer_and_hidden = 10**6 * (4096 * 2 + 8 * 256 * 2)
    chunk = 2048 * 3 * 14336 * 2
    assert device.prefill == one_layer_and_hidden + chunk
    assert device.full_kv == 10**6 * LLAMA.token_bytes
    assert device.total < device.full_kv / 4
