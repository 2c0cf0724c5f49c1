"""Tells models and datasets apart by content, so that answers of two are never mixed."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SAMPLED_BYTES = 1 << 16
_PATTERNS = ("*.json", "*.safetensors", "*.bin")


def model_fingerprint(model: str) -> str:
    """Name and digest of a model directory; the name alone for one on the hub.

    The digest covers the size, the first and the last 64 KiB of every configuration and weight
    file: training changes them.
    """
    directory = Path(model)
    if not directory.is_dir():
        return model
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(path for pattern in _PATTERNS for path in directory.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLED_BYTES))
            file.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(file.read())
    return f"{directory.name} ({digest.hexdigest()})"


def file_fingerprint(path: Path) -> str:
    """Name and digest of a file; "missing" in place of the digest where there is none."""
    if not path.is_file():
        return f"{path.name} (missing)"
    with path.open("rb") as file:
        return f"{path.name} ({hashlib.file_digest(file, 'blake2b').hexdigest()[:12]})"
