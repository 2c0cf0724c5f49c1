"""A machine profile: what a retrieval node's machine and network really do, kept in a JSON file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longreach.errors import InvalidRequest

DEFAULT_PROFILE = Path(".longreach") / "machine.json"
_FORMAT = "longreach-machine-1"


@dataclass(frozen=True, slots=True)
class MachineProfile:
    """Measured on one machine with `longreach plan --measure`.

    memory_bytes_s: sequential read of memory by all cores, bytes/s. round_trip_s: one layer's
    query and answer over a long-lived gRPC stream on loopback, median, seconds. memory_bytes: of
    the machine. measured_at: ISO 8601, UTC.
    """

    memory_bytes_s: float
    round_trip_s: float
    cores: int
    memory_bytes: int
    cpu: str
    measured_at: str

    def save(self, path: Path) -> None:
        """Writes the profile, with the folders it needs."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": _FORMAT} | dataclasses.asdict(self), indent=2)
        path.write_text(text + "\n")

    @classmethod
    def load(cls, path: Path) -> MachineProfile:
        """Reads a profile. Raises InvalidRequest when the file is not one."""
        try:
            values: Mapping[str, Any] = json.loads(path.read_text())
            if values.get("format") != _FORMAT:
                raise ValueError(f"format is {values.get('format')!r}, not {_FORMAT!r}")
            return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})
        except (ValueError, KeyError, AttributeError) as error:
            raise InvalidRequest(
                f"{path} is not a machine profile ({error}); write one with "
                "`longreach plan --measure`"
            ) from None
