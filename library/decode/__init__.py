"""Decode methods, one per file. Importing this package registers them all."""

from library.decode import (
    dilated,
    full,
    infllm,
    quest,
    retrieval,
    snapkv,
    static_top_k,
    streaming_llm,
    strided,
)
from library.decode.base import DECODE_METHODS, DecodeMethod, Found, LayerContext, Search
from library.decode.spec import decode_names, parse_decode

__all__ = [
    "DECODE_METHODS",
    "DecodeMethod",
    "Found",
    "LayerContext",
    "Search",
    "decode_names",
    "dilated",
    "full",
    "infllm",
    "parse_decode",
    "quest",
    "retrieval",
    "snapkv",
    "static_top_k",
    "streaming_llm",
    "strided",
]
