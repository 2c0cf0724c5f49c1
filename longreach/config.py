"""Service configuration: one frozen dataclass per service, read once from flags and environment.

Every field carries its prose in `field(metadata={"help": ...})`. A field `memory_limit_bytes` of a
service is set by the flag `--memory-limit-bytes` or the variable `LONGREACH_MEMORY_LIMIT_BYTES`;
flags win. Sizes may be written 512MiB, 2GiB. `--help` prints every field with its default.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from longreach.errors import InvalidRequest

C = TypeVar("C")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def setting(default: Any, help: str) -> Any:
    """A config field with its default and its prose."""
    return dataclasses.field(default=default, metadata={"help": help})


def parse_bytes(text: str) -> int:
    """Bytes from "1048576", "1MiB" or "1.5GB"."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    unit = match.group(2).upper() if match else None
    if match is None or unit not in _UNITS:
        raise InvalidRequest(f"{text!r} is not a size; write for example 512MiB or 2GB")
    return int(float(match.group(1)) * _UNITS[unit])


def _parse(text: str, kind: Any, name: str) -> Any:
    if kind is bool:
        if text.lower() in ("1", "true", "yes", "on"):
            return True
        if text.lower() in ("0", "false", "no", "off"):
            return False
        raise InvalidRequest(f"{name} is {text!r}; write true or false")
    try:
        if kind is int and name.endswith("_bytes"):
            return parse_bytes(text)
        return kind(text)
    except ValueError:
        raise InvalidRequest(f"{name} is {text!r}, which is not {kind.__name__}") from None


def read_config(
    config: type[C],
    program: str,
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> C:
    """Reads a config dataclass from flags, then environment, then defaults."""
    environ = os.environ if environ is None else environ
    assert dataclasses.is_dataclass(config)
    parser = argparse.ArgumentParser(
        prog=program, description=config.__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    kinds = typing.get_type_hints(config)
    for f in dataclasses.fields(config):
        variable = f"LONGREACH_{f.name.upper()}"
        parser.add_argument(
            "--" + f.name.replace("_", "-"),
            metavar=kinds[f.name].__name__.upper(),
            # argparse formats help texts with %, so a percent sign is doubled.
            help=f"{f.metadata.get('help', '')}\n[{variable}, default {f.default!r}]".replace(
                "%", "%%"
            ),
        )
    flags = vars(parser.parse_args(argv))
    values: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        text = flags[f.name]
        if text is None:
            text = environ.get(f"LONGREACH_{f.name.upper()}")
        if text is not None:
            values[f.name] = _parse(text, kinds[f.name], f.name)
    return config(**values)
