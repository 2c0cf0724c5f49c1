"""A prefill method as text: "dense", "adaptive", "vertical_slash:verticals=500,slashes=1500".

The canonical text names every parameter, and is part of the identity of the KV that a prefill
makes: KV of two methods is never mixed. "minference:file=PATH" has its patterns per head in a file;
its canonical text names the file's digest, because the same choices make the same KV wherever the
file lies.
"""

from __future__ import annotations

import inspect
import logging
from pathlib import Path

from gpu_worker.patterns.adaptive import Adaptive
from gpu_worker.patterns.base import PATTERNS, Pattern
from gpu_worker.patterns.per_head import MInference
from longreach.errors import InvalidRequest
from longreach.steps import ModelInfo

log = logging.getLogger(__name__)

PATTERNS_FILE = "patterns.json"
"""Where a model's directory has its patterns file."""


def pattern_for_model(text: str, model: ModelInfo) -> Pattern:
    """The pattern that `text` names, for one model.

    "minference" without a file takes the one in the model's directory; where there is none, the
    pattern is `adaptive`, which needs no file. Raises InvalidRequest as `parse_pattern` does, and
    for a patterns file of a model of another shape.
    """
    if text.strip() == MInference.name:
        file = Path(model.source) / PATTERNS_FILE
        if not file.is_file():
            log.warning(
                "model %s has no %s, so prefills use adaptive; longreach search-patterns makes one",
                model.source,
                PATTERNS_FILE,
            )
            return Adaptive()
        pattern: Pattern = MInference(str(file))
    else:
        pattern = parse_pattern(text)
    if isinstance(pattern, MInference):
        choices = pattern.head_choices
        choices.require_model(model.model, model.layers)
        if choices.revision != model.revision:
            log.warning(
                "%s was searched on another revision of %s; its choices may suit this one less",
                pattern.file,
                choices.model,
            )
    return pattern


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
    if isinstance(pattern, MInference):
        return f"{pattern.name}:digest={pattern.head_choices.digest}"
    values = ",".join(f"{key}={getattr(pattern, key)}" for key in parameters_of(type(pattern)))
    return f"{pattern.name}:{values}" if values else pattern.name


def parameters_of(kind: type[Pattern]) -> dict[str, int | float | bool | str]:
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
