"""A prefill method as text: "dense", "adaptive", "vertical_slash:verticals=500,slashes=1500".

The canonical text names every parameter, and is part of the identity of the KV that a prefill
makes: KV of two methods is never mixed.
"""

from __future__ import annotations

import inspect

from gpu_worker.patterns.base import PATTERNS, Pattern
from longreach.errors import InvalidRequest


def parse_pattern(text: str) -> Pattern:
    """The pattern that `text` names, with its parameters; defaults where it names none.

    Raises InvalidRequest for an unknown name or parameter, or a value of another type.
    """
    name, _, rest = text.strip().partition(":")
    kind = PATTERNS[name]
    known = parameters_of(kind)
    given: dict[str, object] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        default = known.get(key.strip())
        if default is None:
            raise InvalidRequest(
                f"prefill pattern {name!r} has no parameter {key.strip()!r}; it has "
                f"{', '.join(known) or 'none'}"
            )
        given[key.strip()] = _parse_value(text, key.strip(), value.strip(), default)
    return kind(**given)


def canonical(pattern: Pattern) -> str:
    """The text of a pattern with every parameter, in the order of its definition."""
    values = ",".join(f"{key}={getattr(pattern, key)}" for key in parameters_of(type(pattern)))
    return f"{pattern.name}:{values}" if values else pattern.name


def parameters_of(kind: type[Pattern]) -> dict[str, int | float | bool]:
    """Parameters of a pattern with their defaults."""
    signature = inspect.signature(kind)
    return {name: parameter.default for name, parameter in signature.parameters.items()}


def _parse_value(text: str, key: str, value: str, default: object) -> object:
    if isinstance(default, bool):
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
    else:
        try:
            return type(default)(value)  # type: ignore[call-arg]
        except ValueError:
            pass
    raise InvalidRequest(
        f"prefill {text!r}: {key} is {value!r}, which is not {type(default).__name__}"
    )
