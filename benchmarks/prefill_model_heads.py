"""Queries, keys and values of a real model's layers, for measuring prefill patterns on them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from benchmarks.prefill_heads import Heads
from gpu_worker.attention import causal_attention
from models.haystacks import make_context

_RECORDING = "longreach_benchmark_recording"
_recorded: list[Heads] = []


def _record_and_attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Dense attention of a whole prompt; keeps what it was given. query [1, q_heads, n, d]."""
    _recorded.append(Heads(query[0].clone(), key[0].clone(), value[0].clone()))
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    part = causal_attention(query[0], key[0], value[0], 0, scale)
    return part.output.transpose(0, 1)[None].to(query.dtype), None


AttentionInterface.register(_RECORDING, _record_and_attend)


@cache
def model_heads(model: Path, haystack: str, tokens: int, seed: int) -> tuple[Heads, ...]:
    """Every layer's heads over one context of about `tokens` tokens, fp32, after the rotation.

    `haystack` is one of `models.haystacks.HAYSTACKS`; the text of a seed is the same on each call.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = make_context(haystack, tokens, seed, tokenizer.backend_tokenizer).text
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    module = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation=_RECORDING
    )
    _recorded.clear()
    with torch.inference_mode():
        module.eval()(input_ids=ids, use_cache=False, logits_to_keep=1)
    layers = tuple(_recorded)
    _recorded.clear()
    return layers
