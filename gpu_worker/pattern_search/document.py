"""The search's files: the patterns file, and the state of a search under way beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Replaces the file at once: a reader sees the old or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(json.dumps(document, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


class SearchState:
    """Layers searched so far, on disk after each; a search with other inputs starts anew."""

    def __init__(self, output: Path, inputs: dict[str, Any]) -> None:
        self._path = output.with_name(f"{output.name}.partial")
        self._inputs = json.loads(json.dumps(inputs))
        self.layers: dict[int, dict[str, Any]] = {}
        try:
            saved = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if saved.get("inputs") == self._inputs:
            self.layers = {int(layer): found for layer, found in saved["layers"].items()}

    def add(self, layer: int, found: dict[str, Any]) -> None:
        """Keeps one layer's result."""
        self.layers[layer] = found
        write_json(self._path, {"inputs": self._inputs, "layers": self.layers})

    def remove(self) -> None:
        """The search is done."""
        self._path.unlink(missing_ok=True)
