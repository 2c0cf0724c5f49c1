"""The prefill figures: what they measure on known heads, and every command end to end."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.encoding import Encoder
from evaluation.prefill_figures.__main__ import main
from evaluation.prefill_figures.comparison import KeptMass, dense_lse
from evaluation.prefill_figures.prompts import make_prompts
from evaluation.prefill_figures.recall import recall, row_masses
from evaluation.prefill_figures.stability import summary
from gpu_worker.pattern_search.capture import LayerTensors
from gpu_worker.pattern_search.measuring import LayerMeter
from gpu_worker.patterns.a_shape import AShape
from gpu_worker.patterns.reference import selection_mask
from tests.tiny_models import save_byte_tokenizer
from tests.unit.gpu_worker.worker_models import random_module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("figures") / "tiny"
    random_module("qwen3", num_hidden_layers=2).save_pretrained(directory)
    save_byte_tokenizer(directory)
    return str(directory)


def random_layer(n: int = 400) -> LayerTensors:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(h, n, 16, generator=g) for h in (4, 2, 2))
    return LayerTensors(0, q, k, v, 0.25)


def test_prompts_have_the_exact_length_and_differ(encoder: Encoder) -> None:
    prompts = make_prompts(encoder, 3000, 6)
    assert {len(ids) for _, ids in prompts} == {3000}
    assert len({ids for _, ids in prompts}) == len({name for name, _ in prompts}) == 6


def test_recall_is_the_mass_of_the_heaviest_columns() -> None:
    masses = row_masses(random_layer(), 5)
    assert torch.allclose(masses.sum(-1), torch.ones(4, 5), atol=1e-5)
    assert masses[:, 0, 201:].sum() == 0  # The first row measured is at position 200.
    by_hand = masses.sort(-1, descending=True).values[..., :7].sum(-1).mean(-1)
    assert torch.allclose(recall(masses, masses, 7), by_hand)
    assert torch.allclose(recall(masses, masses, 400), torch.ones(4), atol=1e-5)


def test_recall_with_another_prompts_columns_counts_this_prompts_mass_on_them() -> None:
    here = torch.tensor([[[0.7, 0.2, 0.1]]])
    there = torch.tensor([[[0.1, 0.3, 0.6]]])
    assert recall(here, there, 1).tolist() == pytest.approx([0.1])
    assert recall(here, there, 2).tolist() == pytest.approx([0.3])


def test_kept_mass_is_the_attention_inside_the_selection() -> None:
    tensors = random_layer()
    meter, pattern = LayerMeter(tensors, 128, 9), AShape(64, 64)
    kept = KeptMass(dense_lse(meter))
    meter.run(pattern, kept)
    selection = pattern.select(tensors.q, tensors.k, 0, 400, 0.25, None)
    logits = tensors.q @ tensors.k.repeat_interleave(2, 0).transpose(1, 2) * 0.25
    future = torch.ones(400, 400, dtype=torch.bool).triu(1)
    mass = logits.masked_fill(future, -torch.inf).softmax(-1)
    want = (mass * selection_mask(selection, 4, 0, 400)).sum(-1).mean()
    assert kept.mean == pytest.approx(float(want), rel=1e-4)


def test_stability_is_the_share_of_prompts_that_agree() -> None:
    rows: list[dict[str, Any]] = [
        {"layer": 0, "q_head": 1, "pattern": pattern} for pattern in ("a", "b", "a", "a")
    ]
    assert summary(rows) == [{"layer": 0, "q_head": 1, "pattern": "a", "stability": 0.75}]


CHUNKS = ["--chunk-rows", "256", "--chunks", "2"]


@pytest.mark.parametrize(
    ("command", "flags", "columns", "rows"),
    [
        ("recall", ["--tokens", "1K", "--prompts", "2", "--rows", "8"],
         {"recall", "reused_recall", "q_head"}, 2 * 2 * 4 * 4),
        ("stability", ["--tokens", "1K", "--prompts", "2", *CHUNKS],
         {"pattern", "candidate", "error"}, 2 * 2 * 4),
        ("compare", ["--tokens", "1K", *CHUNKS],
         {"form", "ms", "index_share", "density", "recall", "output_error"}, 2 * 8),
        ("latency", ["--lengths", "512", "1K", "--patterns", "a_shape", "adaptive", *CHUNKS],
         {"method", "seconds", "index_s", "density", "speedup"}, 2 * 3),
        ("needle", ["--lengths", "600", "--patterns", "dense", "a_shape"],
         {"pattern", "length", "depth", "score"}, 2 * 10),
    ],
)  # fmt: skip
def test_every_command_writes_its_figures(
    command: str, flags: list[str], columns: set[str], rows: int, model: str, tmp_path: Path
) -> None:
    assert main([command, "--model", model, "--out", str(tmp_path), *flags]) == 0
    report = json.loads((tmp_path / f"{command}.json").read_text())
    assert len(report["results"]) == rows
    assert columns <= set(report["results"][-1])
    assert "tiny" in report["config"]["model"]
    assert report["machine"]["cores"] > 0
    with (tmp_path / f"{command}.csv").open() as file:
        assert len(list(csv.DictReader(file))) == rows
    plots = list(tmp_path.glob(f"{command}*.png"))
    assert plots
    assert all(path.stat().st_size > 5000 for path in plots)


def test_an_unknown_pattern_ends_the_command_with_its_names(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ["latency", "--model", model, "--out", str(tmp_path), "--patterns", "zigzag"]
    assert main(flags) == 2
    assert not list(tmp_path.iterdir())
