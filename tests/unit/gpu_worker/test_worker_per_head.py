"""Patterns per head: each head selects as if alone, and a file fits one model only."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.chunking import FixedChunks
from gpu_worker.patterns import PATTERNS, attend_chunk
from gpu_worker.patterns.adaptive import Adaptive
from gpu_worker.patterns.head_choices import FORMAT, HeadChoice, model_shapes
from gpu_worker.patterns.per_head import MInference, group_heads, per_head_layer
from gpu_worker.patterns.reference import attend_reference, selection_mask
from gpu_worker.patterns.spec import canonical, parse_pattern, pattern_for_model
from gpu_worker.prefill import PrefillJob
from longreach.errors import Internal, InvalidRequest
from longreach.types import IntArray, StorageArray
from tests.unit.gpu_worker.worker_models import assert_logits_equal, random_model, random_tokens

CHOICES = (
    HeadChoice("a_shape", (("sink_tokens", 64), ("window_tokens", 128))),
    HeadChoice("vertical_slash", (("verticals", 40), ("slashes", 120))),
    HeadChoice("vertical_slash", (("verticals", 70), ("slashes", 20))),
    HeadChoice("block_sparse", (("top_blocks", 3),)),
    HeadChoice("dense"),
)


class NoSink:
    def put(self, layer: int, start: int, keys: StorageArray, values: StorageArray) -> None:
        pass

    def put_queries(self, layer: int, positions: IntArray, queries: StorageArray) -> None:
        pass


def document(model: Any, choices: list[HeadChoice]) -> dict[str, Any]:
    heads = [{"pattern": c.pattern, "parameters": dict(c.parameters)} for c in choices]
    return {
        "format": FORMAT,
        "model": {
            "name": model.info.model,
            "revision": model.info.revision,
            "layers": [list(shape) for shape in model_shapes(model.layers)],
        },
        "layers": [heads] * len(model.layers),
    }


def write(path: Path, what: object) -> str:
    path.write_text(json.dumps(what))
    return str(path)


@settings(max_examples=20, deadline=None)
@given(
    choices=st.lists(st.sampled_from(CHOICES), min_size=6, max_size=6),
    kv_heads=st.sampled_from([1, 2, 3, 6]),
    n=st.integers(1, 700),
)
def test_each_head_selects_what_its_own_pattern_would(
    choices: list[HeadChoice], kv_heads: int, n: int
) -> None:
    g = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(h, n, 16, generator=g) for h in (6, kv_heads, kv_heads))
    start, scale = n // 2 // 128 * 128, 0.25
    layer = per_head_layer(choices, kv_heads)
    state = layer.probe(q[:, -64:], k, scale)
    selection = layer.select(q[:, start:], k, start, n, scale, state)
    mask = selection_mask(selection, 6, start, n - start)
    for head, choice in enumerate(choices):
        own_k = k[head * kv_heads // 6][None]
        pattern = choice.build()
        probed = pattern.probe(q[head : head + 1, -64:], own_k, scale)
        own = pattern.select(q[head : head + 1, start:], own_k, start, n, scale, probed)
        assert torch.equal(mask[head], selection_mask(own, 1, start, n - start)[0]), choice
    expected = attend_reference(q[:, start:], k, v, start, scale, selection)
    result = attend_chunk(layer, q[:, start:], k, v, start, n, scale, state)
    assert torch.allclose(result.output, expected.output, atol=2e-5)
    assert torch.allclose(result.lse, expected.lse, atol=2e-5)
    assert result.pairs_attended == expected.pairs_attended


def test_heads_of_equal_choice_select_together() -> None:
    a, b = CHOICES[0], CHOICES[3]
    groups = group_heads([a, b, a, b, b, b], kv_heads=3)
    assert [group.heads.tolist() for group in groups] == [[0, 2], [1, 3, 4, 5]]
    # The first group has one query head of each of two KV heads; the second one, one and two.
    assert [group.kv_heads.tolist() for group in groups] == [[0, 1], [0, 1, 2, 2]]


def test_only_a_layer_with_a_probing_head_sweeps_the_prompt_twice() -> None:
    assert per_head_layer([CHOICES[0], CHOICES[3]], 1).needs == "chunk"
    assert per_head_layer([CHOICES[0], CHOICES[1]], 1).needs == "prompt"


def test_a_prompt_that_every_head_keeps_whole_is_dense() -> None:
    q, k = torch.randn(2, 150, 16), torch.randn(1, 150, 16)
    layer = per_head_layer([CHOICES[0], CHOICES[3]], 1)
    assert layer.select(q, k, 0, 150, 0.25, None) is None
    assert layer.select(q.repeat(1, 4, 1), k.repeat(1, 4, 1), 0, 600, 0.25, None) is not None


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_prefill_uses_the_file_and_counts_what_it_really_attended(
    family: str, tmp_path: Path
) -> None:
    model = random_model(family)
    tokens = random_tokens(600)

    def prefill(name: str, choices: list[HeadChoice]) -> tuple[torch.Tensor, float]:
        file = write(tmp_path / name, document(model, choices))
        pattern = pattern_for_model(f"minference:file={file}", model.info)
        job = PrefillJob(tokens, model.layers, NoSink(), FixedChunks(256), pattern=pattern)
        logits = job.run(model.module, model.device)
        return logits, job.pairs_attended / job.pairs_visible

    job = PrefillJob(tokens, model.layers, NoSink(), FixedChunks(256))
    want = job.run(model.module, model.device)
    whole = HeadChoice("a_shape", (("sink_tokens", 64), ("window_tokens", 600)))
    logits, density = prefill("whole.json", [whole] * 4)
    assert density == 1.0
    assert_logits_equal(logits, want)
    logits, density = prefill("mixed.json", list(CHOICES[:4]))
    assert density < 1.0
    assert not torch.allclose(logits, want, atol=1e-4)


def test_the_canonical_text_names_the_choices_not_the_place(tmp_path: Path) -> None:
    model = random_model("llama")
    first = document(model, list(CHOICES[:4]))
    texts = [
        canonical(parse_pattern(f"minference:file={write(tmp_path / name, what)}"))
        for name, what in (
            ("a.json", first),
            ("b.json", {**first, "machine": "another"}),
            ("c.json", document(model, list(CHOICES[1:]))),
        )
    ]
    assert texts[0].startswith("minference:digest=")
    assert texts[0] == texts[1] != texts[2]


def test_minference_takes_the_file_of_the_models_directory_or_falls_back_to_adaptive(
    tmp_path: Path,
) -> None:
    model = random_model("llama")
    info = replace(model.info, source=str(tmp_path))
    assert isinstance(pattern_for_model("minference", info), Adaptive)
    write(tmp_path / "patterns.json", document(model, list(CHOICES[:4])))
    assert isinstance(pattern_for_model("minference", info), MInference)


def test_a_file_of_another_model_is_refused_with_the_values(tmp_path: Path) -> None:
    file = write(tmp_path / "p.json", document(random_model("llama"), list(CHOICES[:4])))
    text = f"minference:file={file}"
    with pytest.raises(InvalidRequest, match=r"'llama' with 3 layers; 'deep' has 5"):
        pattern_for_model(text, replace(_info(num_hidden_layers=5), model="deep"))
    with pytest.raises(InvalidRequest, match=r"4 query heads, 2 KV heads.*'wide' has 8, 2 and 8"):
        pattern_for_model(text, replace(_info(num_attention_heads=8), model="wide"))


def _info(**changes: Any) -> Any:
    return random_model("llama", **changes).info


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "other"}, "its format is not"),
        ({"layers": [[]]}, "damaged.*1 of 3 layers"),
        ({"layers": [None, None, [{"pattern": "dense", "parameters": {}}]]}, "1 choices for 4"),
        ({"layers": [[{"pattern": "adaptive", "parameters": {}}] * 4] * 3}, "heads can mix"),
        ({"layers": [[{"pattern": "dense", "parameters": {"x": 1}}] * 4] * 3}, "damaged"),
        ({"layers": [[{"pattern": "dense"}] * 4] * 3}, "damaged.*parameters"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    model = random_model("llama")
    file = write(tmp_path / "p.json", {**document(model, list(CHOICES[:4])), **change})
    with pytest.raises(InvalidRequest, match=says):
        pattern_for_model(f"minference:file={file}", model.info)


def test_a_missing_file_and_no_file_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="search-patterns makes one"):
        PATTERNS["minference"]()
    with pytest.raises(InvalidRequest, match="No such file"):
        canonical(parse_pattern(f"minference:file={tmp_path / 'none.json'}"))


def test_minference_itself_never_selects(tmp_path: Path) -> None:
    file = write(tmp_path / "p.json", document(random_model("llama"), list(CHOICES[:4])))
    with pytest.raises(Internal, match="for_layer"):
        MInference(file).select(torch.zeros(4, 1, 16), torch.zeros(2, 1, 16), 0, 1, 1.0, None)
    assert "digest" in repr(MInference(file))
