"""The offline pattern search: sizes follow measured cost, heads get least error, runs resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_worker.attention import causal_attention
from gpu_worker.pattern_search import SearchConfig, measuring, search
from gpu_worker.pattern_search.capture import LayerTensors, visit_layers
from gpu_worker.pattern_search.measuring import LayerMeter, chunk_starts
from gpu_worker.pattern_search.search import search_layer, search_steps
from gpu_worker.pattern_search.sizing import size_to_cost
from gpu_worker.pattern_search.space import SPACE, TARGET, space_scale
from gpu_worker.patterns.executor import attend_selection
from gpu_worker.patterns.head_choices import HeadChoice, read_choices
from gpu_worker.patterns.per_head import per_head_layer
from longreach.errors import InvalidRequest
from tests.unit.gpu_worker.worker_models import eager, random_model, random_tokens

CONFIG = SearchConfig(chunk_rows=256, chunks=2, repeats=1)


@pytest.fixture(autouse=True)
def counted_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time goes by the pairs attended, so that costs are the same on every machine."""
    now = [0.0]

    def attend(*arguments: Any) -> Any:
        result = attend_selection(*arguments)
        now[0] += result.pairs_attended
        return result

    monkeypatch.setattr(measuring, "attend_selection", attend)
    monkeypatch.setattr(LayerMeter, "_now", lambda self: now[0])


def size_of(choice: HeadChoice) -> int:
    return sum(size for _, size in choice.parameters)


def test_the_space_is_the_published_one() -> None:
    assert [candidate.name for candidate in SPACE] == [
        "a_shape(1024, 4096)",
        "vertical_slash(30, 2048)",
        "vertical_slash(100, 1800)",
        "vertical_slash(500, 1500)",
        "vertical_slash(3000, 200)",
        "block_sparse(100)",
    ]
    assert space_scale(30_000) == space_scale(128_000) == 1.0
    assert space_scale(15_000) == 0.5
    assert TARGET.scaled(0.5).parameters == (("sink_tokens", 512), ("window_tokens", 2048))


@pytest.mark.parametrize("candidate", SPACE, ids=lambda each: each.name)
@pytest.mark.parametrize("true_factor", [0.3, 1.0, 2.5])
def test_sizes_are_adjusted_until_the_measured_cost_meets_the_target(
    candidate: Any, true_factor: float
) -> None:
    # A third of the cost does not depend on the size, as index building does not.
    wanted = size_of(candidate.scaled(true_factor))
    sized = size_to_cost(
        candidate, 1.0, 100_000, 0.1, lambda choice: 1 / 3 + 2 / 3 * size_of(choice) / wanted
    )
    assert sized.fits
    assert abs(sized.cost_ratio - 1) <= 0.1
    assert size_of(sized.choice) == pytest.approx(wanted, rel=0.2)


def test_a_candidate_that_is_always_dearer_does_not_fit() -> None:
    sized = size_to_cost(SPACE[1], 1.0, 30_000, 0.1, lambda choice: 2.0 + size_of(choice) / 1e6)
    assert not sized.fits


def test_a_candidate_that_keeps_the_whole_prompt_and_is_cheaper_fits() -> None:
    asked = []
    sized = size_to_cost(TARGET, 1.0, 900, 0.1, lambda choice: asked.append(choice) or 0.5)
    assert sized.fits
    assert len(asked) == 1


def test_measured_chunks_are_spread_and_end_with_the_last() -> None:
    assert chunk_starts(1000, 256, 2) == [256, 768]
    assert chunk_starts(1000, 256, 9) == [0, 256, 512, 768]
    assert chunk_starts(100, 256, 3) == [0]


def test_capture_shows_every_layer_as_the_model_itself_computes_it() -> None:
    model = random_model("qwen3")
    tokens = random_tokens(300)
    seen: list[LayerTensors] = []
    visit_layers(model, tokens, lambda t: seen.append(replace(t, k=t.k.clone())))
    assert [each.layer for each in seen] == [0, 1, 2]
    ids = torch.tensor([list(tokens)])
    output = eager(model, lambda m: m(input_ids=ids, output_attentions=True, use_cache=False))
    for each, wanted in zip(seen, output.attentions, strict=True):
        wide_k = each.k.repeat_interleave(2, 0)
        logits = each.q @ wide_k.transpose(1, 2) * each.scale
        future = torch.ones(300, 300, dtype=torch.bool).triu(1)
        got = logits.masked_fill(future, -torch.inf).softmax(-1)
        assert torch.allclose(got, wanted[0], atol=1e-4), each.layer


@pytest.mark.parametrize(("family", "layers"), [("gemma3", [5]), ("gemma2", [])])
def test_layers_that_no_sparse_pattern_serves_are_passed_over(
    family: str, layers: list[int]
) -> None:
    seen: list[int] = []
    visit_layers(random_model(family), random_tokens(200), lambda t: seen.append(t.layer))
    assert seen == layers


def planted_layer(n: int = 1536) -> LayerTensors:
    """Head 0 looks 64 tokens back at most, head 1 at one column far from both ends, head 2 at the
    rows a fixed distance before."""
    g = torch.Generator().manual_seed(0)
    d = 64
    angle = torch.arange(n)[:, None] * (1e3 ** (-torch.arange(d // 2) / (d // 2)))
    rope = lambda at: torch.cat([(angle + at).cos(), (angle + at).sin()], -1)
    k = rope(0.0).clone()
    k = torch.stack([k, 0.1 * torch.randn(n, d, generator=g), k])
    k[1, n // 2] = 3.0
    far = torch.roll(rope(0.0), 600, 0)  # Row i is like key i - 600.
    q = torch.stack([rope(0.0) * 4, torch.full((n, d), 0.5), far * 4])
    return LayerTensors(0, q, k, torch.randn(3, n, d, generator=g), d**-0.5 * 8)


def test_a_head_gets_the_pattern_of_its_structure() -> None:
    found = search_layer(planted_layer(), CONFIG)
    names = [head["pattern"] for head in found["heads"]]
    assert names[1:] == ["vertical_slash", "vertical_slash"]
    by_name = {row["candidate"]: row for row in found["candidates"]}
    assert by_name[TARGET.name]["cost_ratio"] == 1.0
    assert by_name[TARGET.name]["errors"][1] > 10 * found["heads"][1]["error"]
    assert by_name[TARGET.name]["errors"][2] > 3 * found["heads"][2]["error"]
    for head, chosen in enumerate(found["heads"]):
        fitting = [row["errors"][head] for row in found["candidates"] if row["fits"]]
        assert chosen["error"] == min(fitting)


def test_errors_are_relative_to_dense_for_each_head() -> None:
    tensors = planted_layer(600)
    meter = LayerMeter(tensors, 256, 2)
    pattern = per_head_layer([TARGET.scaled(0.02)] * 3, 3)
    cost, errors = meter.errors(pattern, meter.dense())
    dense = causal_attention(tensors.q, tensors.k, tensors.v, 0, tensors.scale).output
    selection = pattern.select(tensors.q, tensors.k, 0, 600, tensors.scale, None)
    sparse = attend_selection(tensors.q, tensors.k, tensors.v, 0, tensors.scale, selection).output
    # Two chunks of three, [0, 256) and [512, 600), were measured.
    rows = [row for start in chunk_starts(600, 256, 2) for row in range(start, start + 256)]
    rows = [row for row in rows if row < 600]
    want = (sparse - dense)[:, rows].norm(dim=(1, 2)) / dense[:, rows].norm(dim=(1, 2))
    assert errors == pytest.approx(want.tolist(), rel=1e-4, abs=1e-6)
    assert errors[1] > 0.01
    assert 0 < cost.density < 1


def test_a_search_writes_a_file_that_a_prefill_takes(tmp_path: Path) -> None:
    model = random_model("llama")
    path, stages = tmp_path / "model" / "patterns.json", []
    search(
        model, random_tokens(700), path, CONFIG, {"machine": {"cpu": "x"}},
        lambda done, text: stages.append(done),
    )  # fmt: skip
    choices = read_choices(path)
    choices.require_model("llama", model.layers)
    written = json.loads(path.read_text())
    assert written["machine"] == {"cpu": "x"}
    assert written["model"]["revision"] == model.info.revision
    assert written["search"]["space_scale"] == pytest.approx(700 / 30_000)
    assert [len(rows) for rows in written["search"]["candidates"].values()] == [6, 6, 6]
    assert stages == sorted(stages)
    assert stages[-1] == search_steps(model.layers) == 18
    assert [p.name for p in path.parent.iterdir()] == ["patterns.json"]


def test_a_stopped_search_goes_on_after_its_last_finished_layer(tmp_path: Path) -> None:
    model, path = random_model("llama"), tmp_path / "patterns.json"
    tokens = random_tokens(700)

    def stop(done: int, text: str) -> None:
        if text.startswith("layer 1: block"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(model, tokens, path, CONFIG, {}, stop)
    assert not path.exists()
    again: list[str] = []
    resumed = search(model, tokens, path, CONFIG, {}, lambda done, text: again.append(text))
    assert not any(text.startswith("layer 0:") for text in again)
    assert any(text.startswith("layer 1:") for text in again)
    whole = search(model, tokens, tmp_path / "whole.json", CONFIG, {})
    assert resumed["layers"] == whole["layers"]


def test_finished_layers_of_another_prompt_do_not_count(tmp_path: Path) -> None:
    model, path = random_model("llama"), tmp_path / "patterns.json"

    def stop(done: int, text: str) -> None:
        if text == "layer 0 done":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(model, random_tokens(700, seed=1), path, CONFIG, {}, stop)
    again: list[str] = []
    search(model, random_tokens(700, seed=2), path, CONFIG, {}, lambda done, t: again.append(t))
    assert any(text.startswith("layer 0:") for text in again)


@pytest.mark.parametrize(("tokens", "says"), [(100, "at least 512"), (5000, "takes 4096")])
def test_a_prompt_of_a_wrong_length_is_refused(tokens: int, says: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=says):
        search(random_model("llama"), random_tokens(tokens), tmp_path / "p.json", CONFIG, {})
