"""Numbers a person writes or reads: token counts, bytes, durations; and where a number is from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from longreach.errors import InvalidRequest

Origin = Literal["measured", "published", "assumed", "given"]

_TOKENS = {"": 1, "k": 10**3, "m": 10**6, "ki": 2**10, "mi": 2**20}


@dataclass(frozen=True, slots=True)
class Input:
    """A number that an estimate rests on: its unit, where it is from and a word about it."""

    name: str
    value: float
    unit: str
    origin: Origin
    note: str = ""


def parse_tokens(text: str) -> int:
    """Tokens from "200000", "128K" (128,000), "128Ki" (131,072), "1M" or "1Mi"."""
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", text.strip().replace(",", "").replace("_", ""))
    unit = match.group(2).lower() if match else None
    try:
        if match is None or unit not in _TOKENS:
            raise ValueError
        tokens = int(float(match.group(1)) * _TOKENS[unit])
    except ValueError:
        raise InvalidRequest(
            f"{text!r} is not a number of tokens; write for example 200000, 128K or 1M"
        ) from None
    if tokens < 1:
        raise InvalidRequest(f"{text!r} is {tokens} tokens; write 1 or more")
    return tokens


def bytes_text(nbytes: float) -> str:
    """Bytes for reading: "512 B", "15.6 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:,.0f} {unit}" if unit == "B" else f"{nbytes:,.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.1f} GiB"


def seconds_text(seconds: float) -> str:
    """A duration for reading: "4.2 ms", "35.1 s", "21.8 min"."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:,.1f} min"
