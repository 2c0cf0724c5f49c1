"""The shape of a model, from its config.json or by name: layers, parameters, bytes of KV."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longreach.errors import InvalidRequest
from longreach.types import LayerGeometry, storage_dtype

_LLAMA = {"torch_dtype": "bfloat16"}

NAMED: Mapping[str, Mapping[str, Any]] = {
    "llama-2-7b": _LLAMA
    | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
       "intermediate_size": 11008, "vocab_size": 32000},
    "llama-3-8b": _LLAMA
    | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
       "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256},
    "llama-3-70b": _LLAMA
    | {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
       "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256},
    "mistral-7b-v0.3": _LLAMA
    | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
       "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32768},
    "qwen2.5-7b": _LLAMA
    | {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
       "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064},
    "qwen3-8b": _LLAMA
    | {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
       "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288,
       "vocab_size": 151936},
    "yi-9b-200k": _LLAMA
    | {"hidden_size": 4096, "num_hidden_layers": 48, "num_attention_heads": 32,
       "num_key_value_heads": 4, "intermediate_size": 11008, "vocab_size": 64000},
}  # fmt: skip
"""Published configurations, as config.json has them, so that a plan needs no download."""

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only model. `parameters` counts all weights; weights and KV have one dtype;
    `max_positions` is the longest sequence its configuration names, 0 if it names none."""

    name: str
    layers: tuple[LayerGeometry, ...]
    hidden: int
    intermediate: int
    parameters: int
    dtype: str
    max_positions: int = 0

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return storage_dtype(self.dtype).itemsize

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.parameters * self.itemsize

    @property
    def searched(self) -> tuple[LayerGeometry, ...]:
        """Layers of full attention, whose KV is searched on the nodes."""
        return tuple(layer for layer in self.layers if not layer.sliding_window)

    def layer_token_bytes(self, layer: LayerGeometry) -> int:
        """Bytes of K and V of one token in one layer."""
        return layer.kv_heads * (layer.head_dim + layer.value_dim) * self.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token, all layers."""
        return sum(self.layer_token_bytes(layer) for layer in self.layers)


def load_shape(model: str, dtype: str = "auto", parameters: int = 0) -> ModelShape:
    """The shape of a named model, or of the config.json in a folder (or the file itself).

    `dtype` "auto" takes the configuration's own; `parameters` replaces the count made from the
    configuration. Raises InvalidRequest.
    """
    if model in NAMED:
        return shape_from_config(model, NAMED[model], dtype, parameters)
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise InvalidRequest(
            f"no config.json at {model!r}, and no model is built in under that name; built in: "
            f"{', '.join(NAMED)}"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON: {error}") from None
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return shape_from_config(name, config, dtype, parameters)


def shape_from_config(
    name: str, config: Mapping[str, Any], dtype: str = "auto", parameters: int = 0
) -> ModelShape:
    """The shape that a config.json describes. Raises InvalidRequest naming a missing entry."""
    text = config.get("text_config", config)
    try:
        layers = _layers(text)
        hidden, intermediate = int(text["hidden_size"]), int(text["intermediate_size"])
        table = int(text["vocab_size"]) * hidden
    except KeyError as missing:
        raise InvalidRequest(f"the configuration of {name!r} has no {missing}") from None
    tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    if not parameters:
        if any(text.get(key) for key in _EXPERTS):
            raise InvalidRequest(
                f"{name!r} is a mixture of experts, whose weights this does not count; give "
                "--parameters with those that a token uses"
            )
        parameters = table * (1 if tied else 2) + hidden
        parameters += sum(_layer_parameters(layer, hidden, intermediate) for layer in layers)
    if dtype == "auto":
        dtype = str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or "")
    try:
        storage_dtype(dtype or "bfloat16")
    except ValueError as error:
        raise InvalidRequest(f"dtype of {name!r}: {error}") from None
    positions = int(text.get("max_position_embeddings") or 0)
    return ModelShape(
        name, layers, hidden, intermediate, parameters, dtype or "bfloat16", positions
    )


def _layers(text: Mapping[str, Any]) -> tuple[LayerGeometry, ...]:
    q_heads = int(text["num_attention_heads"])
    kv_heads = int(text.get("num_key_value_heads") or q_heads)
    head_dim = int(text.get("head_dim") or text["hidden_size"] // q_heads)
    window = int(text.get("sliding_window") or 0)
    return tuple(
        LayerGeometry(layer, q_heads, kv_heads, head_dim, head_dim, window if slides else 0)
        for layer, slides in enumerate(_sliding(text))
    )


def _sliding(text: Mapping[str, Any]) -> list[bool]:
    """Which layers attend a sliding window only."""
    count = int(text["num_hidden_layers"])
    types = text.get("layer_types")
    if types:
        return [kind == "sliding_attention" for kind in types]
    if not text.get("sliding_window") or text.get("use_sliding_window") is False:
        return [False] * count
    # Older Gemma configurations name a period: every such layer sees everything.
    period = int(text.get("sliding_window_pattern") or 0)
    return [not period or (layer + 1) % period != 0 for layer in range(count)]


def _layer_parameters(layer: LayerGeometry, hidden: int, intermediate: int) -> int:
    """Weights of one layer: projections, a gated feed-forward network and two norms. Biases and
    per-head norms, under a thousandth, are left out."""
    queries = layer.q_heads * layer.head_dim
    keys_values = layer.kv_heads * (layer.head_dim + layer.value_dim)
    output = layer.q_heads * layer.value_dim
    return hidden * (queries + keys_values + output + 3 * intermediate + 2)
