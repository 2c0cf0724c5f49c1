"""What `dump` writes, against the model's own cache and attention weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from evaluation.observations import dump as dump_command
from evaluation.observations.__main__ import main
from evaluation.observations.dump_files import DumpedLayer, read_dump
from evaluation.observations.heads import HeadGroup, Source, dumped_head
from longreach.attention import attention_logits
from longreach.errors import InvalidRequest

TOKENS, DECODE = 300, 20
TEXT = " ".join(f"chapter {i} tells of the number {i * i}" for i in range(40))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def dumped(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    """Dumps a tiny model over TEXT in chunks of 128 tokens; gives the directory."""
    monkeypatch.setattr(dump_command, "CHUNK_TOKENS", 128)
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")

    def make(family: str) -> Path:
        out = tmp_path / family
        sizes = ["--tokens", str(TOKENS), "--decode", str(DECODE), "--queries", "64"]
        files = ["--text", str(text), "--out", str(out)]
        assert main(["dump", "--model", str(tiny_model(family)), *files, *sizes]) == 0
        return out

    return make


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2"])
def test_a_dump_holds_what_the_model_attends(
    family: str, dumped: Callable[[str], Path], tiny_model: Callable[[str], Path]
) -> None:
    dump = read_dump(dumped(family))
    ids = torch.tensor([list(TEXT.encode()[:TOKENS])])
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family), attn_implementation="eager")
    with torch.no_grad():
        output = model.eval()(input_ids=ids, use_cache=True, output_attentions=True)
    assert [layer.layer for layer in dump.layers] == full_layers(model.config)
    for layer in dump.layers:
        cached = output.past_key_values.layers[layer.layer]
        for kv_head in range(layer.kv_heads):
            head = dumped_head(dump, layer, kv_head)
            close(head.keys, cached.keys[0, kv_head, : dump.context])
            close(head.values, cached.values[0, kv_head, : dump.context])
            same_attention(head, layer, output.attentions[layer.layer][0])


def full_layers(config: object) -> list[int]:
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * 3
    return [number for number, kind in enumerate(kinds) if kind == "full_attention"]


def same_attention(head: HeadGroup, layer: DumpedLayer, attention: torch.Tensor) -> None:
    """Weights over the context from the dump's queries, up to each row's own normalisation."""
    positions = [*head.prefill_positions, *range(TOKENS - DECODE, TOKENS)]
    queries = np.concatenate([head.prefill_queries, head.decode_queries], axis=1)
    logits = attention_logits(queries, head.keys, layer.scale, layer.softcap)
    for group_head, q_head in enumerate(head.q_heads):
        for row, position in enumerate(positions):
            stop = min(position + 1, len(head.keys))
            weights = np.exp(logits[group_head, row, :stop] - logits[group_head, row, :stop].max())
            wanted = attention[q_head, position, :stop]
            close(weights / weights.sum(), wanted / wanted.sum())


def close(got: np.ndarray, want: torch.Tensor) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float32), want.float().numpy(), atol=2e-5)


def test_the_header_says_which_text_and_model_it_was(dumped: Callable[[str], Path]) -> None:
    header = json.loads((dumped("llama") / "header.json").read_text())
    assert header["model"].startswith("tiny-llama")
    assert (header["tokens"], header["decode_tokens"]) == (TOKENS, DECODE)
    assert header["text"]["name"] == "text.txt"
    assert header["rope"] == "default"
    assert header["machine"]["cores"] >= 1


def test_the_prompt_queries_end_right_before_the_decode_queries(
    dumped: Callable[[str], Path],
) -> None:
    dump = read_dump(dumped("llama"))
    head = dumped_head(dump, dump.layers[0], 0)
    assert head.prefill_positions[-1] == dump.context - 1
    assert head.decode_queries.shape == (2, DECODE, 16)


def test_a_text_that_is_too_short_is_refused_with_its_length(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("word", encoding="utf-8")
    command = ["dump", "--model", str(tiny_model("llama")), "--text", str(text)]
    assert main([*command, "--tokens", "100", "--out", str(tmp_path / "out")]) == 2
    assert "short.txt has 4 tokens and 100 were asked for" in capsys.readouterr().err


def test_the_default_text_gives_a_million_bytes() -> None:
    name, text = dump_command.long_text(None)
    assert "CPython" in name
    assert len(text) > 1_000_000


def test_a_directory_without_a_header_is_no_dump(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="holds no dump"):
        read_dump(tmp_path)


def test_heads_that_a_dump_lacks_are_named(dumped: Callable[[str], Path]) -> None:
    source = Source("", 0, 0, 0, dumped("llama"), layers=(7,))
    with pytest.raises(InvalidRequest, match=r"it has layers \[0, 1, 2\]"):
        list(source.heads())
