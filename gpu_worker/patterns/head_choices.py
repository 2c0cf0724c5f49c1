"""Which pattern each query head of each layer uses: the JSON that a pattern search writes.

    {"format": "longreach-patterns-1",
     "model": {"name": ..., "revision": ..., "layers": [[q_heads, kv_heads, head_dim], ...]},
     "layers": [[{"pattern": "vertical_slash", "parameters": {"verticals": 30, ...}}, ...], null],
     ...what the search measured...}

One list per layer, one entry per query head; null where a layer was not searched,
because no sparse pattern serves it (a sliding window or a softcap): it is dense.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_worker.patterns.base import PATTERNS, Pattern
from longreach.errors import InvalidRequest
from longreach.types import LayerGeometry

FORMAT = "longreach-patterns-1"
PER_HEAD_PATTERNS = ("a_shape", "block_sparse", "dense", "vertical_slash")
"""Patterns that heads of one layer may mix: all select for query blocks of KEY_BLOCK rows."""


@dataclass(frozen=True, slots=True)
class HeadChoice:
    """One head's pattern, with its parameters by name."""

    pattern: str
    parameters: tuple[tuple[str, int], ...] = ()

    def build(self) -> Pattern:
        """The pattern itself."""
        return PATTERNS[self.pattern](**dict(self.parameters))

    def __str__(self) -> str:
        sizes = ",".join(f"{name}={value}" for name, value in self.parameters)
        return f"{self.pattern}:{sizes}" if sizes else self.pattern


Layers = tuple[tuple[HeadChoice, ...] | None, ...]


@dataclass(frozen=True, slots=True)
class HeadChoices:
    """A model's choices. `shapes`: (q_heads, kv_heads, head_dim) of each layer searched."""

    model: str
    revision: str
    shapes: tuple[tuple[int, int, int], ...]
    layers: Layers

    @property
    def digest(self) -> str:
        """Digest of what the choices make a prefill compute: equal digests, equal KV."""
        table = [None if heads is None else [str(head) for head in heads] for heads in self.layers]
        return hashlib.blake2b(json.dumps(table).encode(), digest_size=8).hexdigest()

    def require_model(self, name: str, layers: Sequence[LayerGeometry]) -> None:
        """Raises InvalidRequest, with the values, where the choices are of another shape."""
        wanted = model_shapes(layers)
        if len(self.shapes) != len(wanted):
            raise InvalidRequest(
                f"the patterns file was made for {self.model!r} with {len(self.shapes)} layers; "
                f"{name!r} has {len(wanted)}: {_WAY_OUT}"
            )
        for number, (found, want) in enumerate(zip(self.shapes, wanted, strict=True)):
            if found != want:
                raise InvalidRequest(
                    f"the patterns file was made for {self.model!r}, whose layer {number} has "
                    f"{found[0]} query heads, {found[1]} KV heads and head size {found[2]}; "
                    f"{name!r} has {want[0]}, {want[1]} and {want[2]} there: {_WAY_OUT}"
                )


_WAY_OUT = "make one for this model with longreach search-patterns"


def model_shapes(layers: Sequence[LayerGeometry]) -> tuple[tuple[int, int, int], ...]:
    """(q_heads, kv_heads, head_dim) of each layer: what a file must agree with."""
    return tuple((each.q_heads, each.kv_heads, each.head_dim) for each in layers)


def read_choices(path: Path) -> HeadChoices:
    """The choices of a patterns file.

    Raises InvalidRequest when there is no such file, or naming what is wrong in it.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"cannot read the patterns file {path}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidRequest(f"the patterns file {path} is not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InvalidRequest(f"{path} is not a patterns file: its format is not {FORMAT!r}")
    try:
        return parse_choices(document)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(f"the patterns file {path} is damaged: {error!r}") from error


def parse_choices(document: Mapping[str, Any]) -> HeadChoices:
    """The choices of a patterns document. Raises InvalidRequest for what a head cannot use."""
    model = document["model"]
    shapes = tuple((int(q), int(kv), int(d)) for q, kv, d in model["layers"])
    layers: Layers = tuple(
        None if heads is None else tuple(_parse_head(head) for head in heads)
        for heads in document["layers"]
    )
    if len(layers) != len(shapes):
        raise ValueError(f"it has choices for {len(layers)} of {len(shapes)} layers")
    for number, (heads, shape) in enumerate(zip(layers, shapes, strict=True)):
        if heads is not None and len(heads) != shape[0]:
            raise ValueError(f"layer {number} has {len(heads)} choices for {shape[0]} query heads")
    return HeadChoices(str(model["name"]), str(model["revision"]), shapes, layers)


def _parse_head(head: Mapping[str, Any]) -> HeadChoice:
    name = str(head["pattern"])
    if name not in PER_HEAD_PATTERNS:
        raise InvalidRequest(
            f"a head of the patterns file uses {name!r}; heads can mix "
            f"{', '.join(PER_HEAD_PATTERNS)}"
        )
    choice = HeadChoice(name, tuple((str(k), int(v)) for k, v in head["parameters"].items()))
    choice.build()  # Parameters that the pattern does not have are refused here, not in a prefill.
    return choice
