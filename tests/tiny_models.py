"""Tiny random models on disk, one per family, and a tokenizer of bytes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

VOCABULARY = 512
"""256 bytes, then <bos>, <eos>, <pad>, then words that no text encodes to."""

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16_384,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}

# Family: configuration class, model class, and what differs from _SHAPE.
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"head_dim": 16}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"head_dim": 16, "sliding_window": None}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 96},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 96,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
}


def save_tiny_model(family: str, directory: Path) -> None:
    """Writes a random model of a family, such as "llama" or "gemma2", with its tokenizer.

    float32, 3 layers, 4 query heads on 2 KV heads of 16, 512 tokens of vocabulary, one token per
    byte of text, the same weights in every run. Attention is peaked and strong, so that which keys
    are found matters to the output.
    """
    import torch
    import transformers

    config_name, model_name, differences = _FAMILIES[family]
    config = getattr(transformers, config_name)(**_SHAPE, **differences)
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(config).to(torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(_gain(name))
    model.save_pretrained(directory)
    save_byte_tokenizer(directory)


def _gain(name: str) -> float:
    """How much larger than its initial value a weight is made."""
    gains = {"q_proj": 12.0, "k_proj": 12.0, "qkv_proj": 6.0, "v_proj": 4.0, "o_proj": 4.0,
             "q_norm": 2.0, "embed_tokens": 8.0, "lm_head": 8.0}  # fmt: skip
    return next((gain for part, gain in gains.items() if f".{part}." in f".{name}"), 1.0)


def save_byte_tokenizer(directory: Path) -> None:
    """A tokenizer in which every byte is a token; ids 0 to 255 are the bytes' values."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: byte for byte, character in enumerate(_byte_alphabet())}
    special = ("<bos>", "<eos>", "<pad>")
    words = range(256 + len(special), VOCABULARY)
    vocabulary |= {text: 256 + index for index, text in enumerate(special)}
    vocabulary |= {f"Ġw{token}": token for token in words}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    tokenizer.save(os.fspath(directory / "tokenizer.json"))
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (directory / "tokenizer_config.json").write_text(json.dumps(described, indent=2))


def _byte_alphabet() -> list[str]:
    """GPT-2's printable character of each byte: itself where printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b if b in printable else 0x100 + others.index(b)) for b in range(256)]
