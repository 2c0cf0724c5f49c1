"""A decode method as text: "full", "streaming_llm:sink=4,window=1020", "sketch:top_k=100".

An index kind of the retrieval nodes is a method too; behind it stands a budget as a request writes
it, and sink and window: "roargraph:mass=0.98[64,4096]+tail,sink=128,window=512".
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from library.decode.base import DECODE_METHODS, DecodeMethod
from library.decode.retrieval import Retrieval
from longreach.errors import InvalidRequest
from retrieval_node.index.base import INDEX_KINDS

_OUTSIDE_BRACKETS = r",(?![^\[]*\])"


def parse_decode(text: str) -> DecodeMethod:
    """The method that `text` names, with its parameters; defaults where it names none.

    Raises InvalidRequest for an unknown name or parameter, or a value out of range.
    """
    name, _, rest = text.strip().partition(":")
    items = [item.strip() for item in re.split(_OUTSIDE_BRACKETS, rest) if item.strip()]
    try:
        if name in INDEX_KINDS:
            return Retrieval(index=name, **_retrieval(items))
        if name not in DECODE_METHODS:
            known = ", ".join(decode_names())
            raise InvalidRequest(
                f"unknown decode method {name!r}; known: {known}", reason="UNKNOWN_NAME"
            )
        return DECODE_METHODS[name](**_given(DECODE_METHODS[name], items))
    except InvalidRequest as error:
        raise InvalidRequest(f"decode {text!r}: {error.message}", reason=error.reason) from None


def decode_names() -> list[str]:
    """Every name that `parse_decode` knows: methods, then index kinds."""
    return [*(name for name in DECODE_METHODS if name != Retrieval.name), *INDEX_KINDS]


def _retrieval(items: list[str]) -> dict[str, Any]:
    """A budget among parameters, as parameters."""
    known = {"sink", "window"}
    budgets = [item for item in items if item.partition("=")[0] not in known]
    if len(budgets) > 1:
        raise InvalidRequest(f"it names {len(budgets)} budgets, {' and '.join(budgets)}")
    others = _given(Retrieval, [item for item in items if item not in budgets])
    return {**others, **({"budget": budgets[0]} if budgets else {})}


def _given(kind: type[DecodeMethod], items: list[str]) -> dict[str, Any]:
    defaults = {each.name: each.default for each in dataclasses.fields(kind)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for item in items:
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in defaults:
            raise InvalidRequest(
                f"it has no parameter {key!r}; it has {', '.join(defaults) or 'none'}"
            )
        kind_of: type = type(defaults[key])
        try:
            given[key] = kind_of(value)
        except ValueError:
            raise InvalidRequest(f"{key} is {value!r}, which is not {kind_of.__name__}") from None
    return given
