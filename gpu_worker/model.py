"""Loads a Hugging Face causal language model and makes it serve longreach's caches."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from gpu_worker.arrays import dtype_name, to_array, torch_dtype
from gpu_worker.attention import ATTENTION_NAME
from gpu_worker.geometry import (
    check_causal,
    check_supported,
    layer_geometries,
    max_positions,
    refuse,
    rope_regime,
    text_config,
)
from gpu_worker.linear import widen_products
from gpu_worker.prefill import decoder_layers, wrap_decoder_layers
from longreach.errors import InvalidRequest
from longreach.steps import ModelInfo
from longreach.types import STORAGE_DTYPES, Identity, LayerGeometry

log = logging.getLogger(__name__)

_SAMPLED_ELEMENTS = 1 << 16


@dataclass(frozen=True, slots=True)
class Model:
    """A model on its device, and what the rest of the cluster has to know of it."""

    module: Any
    info: ModelInfo
    device: torch.device
    dtype: torch.dtype

    @property
    def layers(self) -> tuple[LayerGeometry, ...]:
        """Geometry of every layer."""
        return self.info.layers

    def forward(self, **arguments: Any) -> torch.Tensor:
        """Logits [rows, vocab] of a packed forward pass."""
        with torch.inference_mode():
            logits: torch.Tensor = self.module(use_cache=True, **arguments).logits[0]
        return logits


def load_model(source: str, device: str = "auto", dtype: str = "auto") -> Model:
    """Loads a model from a directory or by its hub name.

    Raises UnsupportedModel for what is known not to be exact, InvalidRequest when there is nothing
    to load.
    """
    if not source:
        raise InvalidRequest("no model was named; pass --model with a directory or a hub name")
    where = torch.device(_pick_device(device))
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"cannot load a model from {source!r}: {error}") from error
    kind = torch_dtype(dtype) if dtype != "auto" else None
    disable_progress_bar()
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        reason = f"{config.model_type!r} is not a causal language model of transformers"
        raise refuse(Path(source).name, reason)
    module = AutoModelForCausalLM.from_pretrained(source, dtype=kind or "auto")
    return prepare_model(module, source, where, config)


def prepare_model(module: Any, source: str, device: torch.device, config: Any = None) -> Model:
    """Checks a transformers model and installs longreach's attention in it."""
    config = module.config if config is None else config
    name = Path(source).name or type(module).__name__
    check_supported(type(module), config, name)
    layers = layer_geometries(config)
    found = decoder_layers(module)
    if len(found) != len(layers):
        raise refuse(
            name, f"it has {len(found)} decoder layers where its config says {len(layers)}"
        )
    check_causal(found, name)
    module = module.to(device).eval()
    module.requires_grad_(False)
    dtype = module.dtype
    if dtype_name(dtype) not in {kind.name for kind in STORAGE_DTYPES}:
        raise refuse(name, f"its dtype {dtype} is not float32, float16 or bfloat16")
    wrap_decoder_layers(module)
    widen_products(module)
    module.set_attn_implementation(ATTENTION_NAME)
    revision = model_revision(module)
    identity = Identity(name, revision, dtype_name(dtype), rope_regime(config))
    info = ModelInfo(
        model=name,
        revision=revision,
        identity=identity,
        layers=layers,
        max_positions=max_positions(config),
        vocab_size=int(text_config(config).vocab_size),
        source=source,
        eos_ids=_eos_ids(module),
    )
    log.info("model %s: %d layers, %s on %s", name, len(layers), dtype_name(dtype), device)
    return Model(module, info, device, dtype)


def model_revision(module: Any) -> str:
    """Digest of configuration and weights, hex.

    Parameters up to 65,536 elements are read whole, larger ones at as many evenly spaced places:
    any training step changes those, and a large model is digested in seconds.
    """
    config = module.config.to_diff_dict()
    for volatile in ("_name_or_path", "transformers_version", "_attn_implementation"):
        config.pop(volatile, None)
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.flatten()
        stride = max(1, flat.numel() // _SAMPLED_ELEMENTS)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_raw_bytes(flat[::stride]))
    return digest.hexdigest()


def _raw_bytes(flat: torch.Tensor) -> bytes:
    if dtype_name(flat.dtype) in {kind.name for kind in STORAGE_DTYPES}:
        return to_array(flat).tobytes()
    return bytes(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())


def _pick_device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _eos_ids(module: Any) -> tuple[int, ...]:
    generation = getattr(module, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    if ids is None:
        ids = getattr(text_config(module.config), "eos_token_id", None)
    if ids is None:
        return ()
    return tuple(int(i) for i in (ids if isinstance(ids, list | tuple) else [ids]))


def rss_bytes() -> int:
    """Resident memory of this process, from the kernel."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
