"""What a model's configuration says about its attention, and what cannot be served exactly.

A refusal names the reason and the families that work. What a configuration cannot tell is left to
the conformance gate, which runs the loaded model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from longreach.errors import UnsupportedModel
from longreach.types import LayerGeometry

SUPPORTED_FAMILIES = (
    "Llama 2, 3 and 3.1 and what has their form, such as Yi",
    "Qwen2",
    "Qwen2.5",
    "Qwen3",
    "Mistral",
    "Phi-3",
    "GLM-4",
    "Gemma 2",
    "Gemma 3",
    "SmolLM3",
    "Cohere 2",
    "gpt-oss",
)
"""Families held to eager attention by the tests; others are decided by the conformance gate."""

_LAYER_TYPES = ("full_attention", "sliding_attention")


def refuse(name: str, reason: str) -> UnsupportedModel:
    """The error for a model that cannot be served exactly."""
    return UnsupportedModel(
        f"model {name!r} cannot be served exactly: {reason}. "
        f"Families known to work: {', '.join(SUPPORTED_FAMILIES)}"
    )


def text_config(config: Any) -> Any:
    """The part of a transformers configuration that describes the decoder."""
    return config.get_text_config(decoder=True)


def check_supported(model_class: type, config: Any, name: str) -> None:
    """Raises UnsupportedModel for what is known to break exactness."""
    if not getattr(model_class, "_supports_attention_backend", False):
        raise refuse(name, f"{model_class.__name__} does not take a registered attention function")
    text = text_config(config)
    if getattr(text, "is_encoder_decoder", False):
        raise refuse(name, "it is an encoder-decoder model")
    if getattr(text, "kv_lora_rank", None):
        raise refuse(name, "multi-head latent attention caches a latent, not keys and values")
    if getattr(text, "attention_chunk_size", None):
        raise refuse(name, "chunked attention layers restart their mask inside a context")
    if getattr(text, "num_kv_shared_layers", 0):
        raise refuse(name, "some layers reuse the keys and values of another layer")
    if getattr(text, "use_bidirectional_attention", False):
        raise refuse(name, "its attention is not causal")
    others = sorted(set(_layer_types(text)) - set(_LAYER_TYPES))
    if others:
        raise refuse(name, f"layers of type {', '.join(others)} are not softmax attention")
    for kind, _ in _ropes(text):
        if kind == "dynamic":
            raise refuse(
                name, "dynamic NTK rope rotates stored keys anew as the longest position grows"
            )


def check_causal(layers: Iterable[Any], name: str) -> None:
    """Raises UnsupportedModel where a decoder layer's attention says that it looks ahead."""
    for layer in layers:
        for part in layer.modules():
            if getattr(part, "is_causal", True) is False:
                raise refuse(
                    name,
                    f"its attention ({type(part).__name__}) is not causal: keys and values of a "
                    "token would change with what follows it",
                )


def layer_geometries(config: Any) -> tuple[LayerGeometry, ...]:
    """Shape of every decoder layer's attention, in order."""
    text = text_config(config)
    q_heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or q_heads)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // q_heads)
    return tuple(
        LayerGeometry(
            layer=layer,
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=head_dim,
            sliding_window=int(text.sliding_window) if kind == "sliding_attention" else 0,
        )
        for layer, kind in enumerate(_layer_types(text))
    )


def rope_regime(config: Any) -> str:
    """Name of the rope scaling; "longrope-short" where only the short factors are served."""
    kinds = sorted({kind for kind, _ in _ropes(text_config(config))})
    names = ["longrope-short" if kind == "longrope" else kind for kind in kinds]
    return "+".join(names) or "default"


def max_positions(config: Any) -> int:
    """Longest position plus one that the model accepts.

    Long-rope families switch every factor when the sequence crosses its original length, which
    stored keys cannot follow: they are served up to that length.
    """
    text = text_config(config)
    limit = int(getattr(text, "max_position_embeddings", 0) or 1 << 20)
    originals = [
        int(rope.get("original_max_position_embeddings") or limit)
        for kind, rope in _ropes(text)
        if kind == "longrope"
    ]
    return min([limit, *originals])


def _layer_types(text: Any) -> list[str]:
    types = getattr(text, "layer_types", None)
    if types:
        return [str(kind) for kind in types]
    kind = "sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"
    return [kind] * int(text.num_hidden_layers)


def _ropes(text: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every rope of the model as (type, parameters); families with two layer types have two."""
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for rope in nested or ([parameters] if parameters else []):
        yield str(rope.get("rope_type", "default")), rope
