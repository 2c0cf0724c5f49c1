"""Model shapes: held to published sizes, to the worker's own reading and to real weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from transformers import AutoConfig, Gemma2Config, Gemma3TextConfig, LlamaConfig, MistralConfig

from gpu_worker.geometry import layer_geometries
from longreach.errors import InvalidRequest
from longreach.planning.quantities import bytes_text, parse_tokens, seconds_text
from longreach.planning.shapes import load_shape, shape_from_config

DEMO = Path(__file__).resolve().parents[3] / "models" / "demo"


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-2-7b", 6.74),
        ("llama-3-8b", 8.03),
        ("llama-3-70b", 70.6),
        ("mistral-7b-v0.3", 7.25),
        ("qwen2.5-7b", 7.62),
        ("qwen3-8b", 8.19),
        ("yi-9b-200k", 8.83),
    ],
)
def test_named_models_have_the_parameters_their_cards_state(name: str, billions: float) -> None:
    assert load_shape(name).parameters / 1e9 == pytest.approx(billions, rel=0.002)


def test_the_demo_models_parameters_are_those_in_its_weights() -> None:
    raw = (DEMO / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header.pop("__metadata__", None)
    real = sum(math.prod(tensor["shape"]) for tensor in header.values())
    assert load_shape(str(DEMO)).parameters == pytest.approx(real, rel=0.001)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(num_attention_heads=8, num_key_value_heads=2, hidden_size=512),
        MistralConfig(num_hidden_layers=3, sliding_window=128),
        MistralConfig(num_hidden_layers=3, sliding_window=None),
        Gemma2Config(num_hidden_layers=4),
        Gemma3TextConfig(num_hidden_layers=13),
    ],
    ids=lambda config: f"{config.model_type}-{getattr(config, 'sliding_window', None)}",
)
def test_layers_are_those_the_worker_would_serve(config: object) -> None:
    written = json.loads(config.to_json_string(use_diff=False))  # type: ignore[attr-defined]
    assert shape_from_config("any", written).layers == layer_geometries(config)


def test_a_folder_with_a_config_is_read_like_the_worker_does() -> None:
    shape = load_shape(str(DEMO))
    assert shape.layers == layer_geometries(AutoConfig.from_pretrained(DEMO))
    assert (shape.name, shape.dtype) == ("demo", "float32")


def test_an_old_gemma_period_marks_every_nth_layer_as_full() -> None:
    config = {
        "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
        "intermediate_size": 128, "vocab_size": 10, "sliding_window": 32,
        "sliding_window_pattern": 3,
    }  # fmt: skip
    windows = [layer.sliding_window for layer in shape_from_config("old", config).layers]
    assert windows == [32, 32, 0, 32, 32, 0]


def test_what_cannot_be_counted_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"built in: llama-2-7b"):
        load_shape("llama-9")
    with pytest.raises(InvalidRequest, match="no 'hidden_size'"):
        shape_from_config("x", {"num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 2})
    experts = {
        "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "intermediate_size": 8, "vocab_size": 10, "num_local_experts": 8,
    }  # fmt: skip
    with pytest.raises(InvalidRequest, match="--parameters"):
        shape_from_config("moe", experts)
    assert shape_from_config("moe", experts, parameters=7).parameters == 7
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidRequest, match="is not JSON"):
        load_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("200000", 200_000), ("128K", 128_000), ("128Ki", 131_072), ("1M", 10**6), ("1.5k", 1500)],
)
def test_token_counts_are_read_as_people_write_them(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "many", "1G", "-5", "0", "1.2.3K"])
def test_what_is_no_token_count_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="tokens"):
        parse_tokens(text)


def test_sizes_and_durations_are_written_for_people() -> None:
    assert [bytes_text(n) for n in (512, 2048, 3 << 20, 125 << 30)] == [
        "512 B", "2.0 KiB", "3.0 MiB", "125.0 GiB",
    ]  # fmt: skip
    assert [seconds_text(s) for s in (0.0042, 35.06, 1306.8)] == ["4.2 ms", "35.1 s", "21.8 min"]
