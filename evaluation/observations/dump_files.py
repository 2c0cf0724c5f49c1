"""A dump on disk: `header.json` and one safetensors file for each layer of full attention.

A layer's file holds, in the model's dtype and after rotary embedding: keys [kv_heads, tokens,
head_dim], values [kv_heads, tokens, value_dim], queries [q_heads, m, head_dim] of sampled prompt
tokens with their positions [m], and decode_queries [q_heads, steps, head_dim] of the last tokens.
Decode queries come from the text itself, not from tokens that the model generated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longreach.errors import InvalidRequest

HEADER = "header.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class DumpedLayer:
    """What the header says of a layer. `has_sinks`: the model's softmax has learned sink logits,
    which these files leave out."""

    layer: int
    file: str
    q_heads: int
    kv_heads: int
    scale: float
    softcap: float
    has_sinks: bool


@dataclass(frozen=True, slots=True)
class Dump:
    """A dump's header. The context is the first `tokens - decode_tokens` tokens."""

    directory: Path
    tokens: int
    decode_tokens: int
    layers: tuple[DumpedLayer, ...]
    header: Mapping[str, Any]

    @property
    def context(self) -> int:
        """Tokens before the decode queries."""
        return self.tokens - self.decode_tokens


def layer_file(layer: int) -> str:
    """Name of a layer's file."""
    return f"layer-{layer:03}.safetensors"


def write_header(directory: Path, header: Mapping[str, Any]) -> None:
    """Writes the header, last: a directory without one is not a dump."""
    text = json.dumps({"format": FORMAT_VERSION, **header}, indent=1)
    (directory / HEADER).write_text(text + "\n", encoding="utf-8")


def read_dump(directory: Path) -> Dump:
    """The dump in a directory; raises InvalidRequest where there is none that can be read."""
    try:
        header = json.loads((directory / HEADER).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InvalidRequest(
            f"{directory} holds no dump ({error}); make one with "
            f"python -m evaluation.observations dump --out {directory}"
        ) from error
    if header.get("format") != FORMAT_VERSION:
        raise InvalidRequest(
            f"{directory} has dump format {header.get('format')}; this version reads "
            f"{FORMAT_VERSION}: dump the model again"
        )
    layers = tuple(DumpedLayer(**layer) for layer in header["layers"])
    return Dump(directory, header["tokens"], header["decode_tokens"], layers, header)
