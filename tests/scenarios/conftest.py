"""One scene for all stories. Each leaves it whole; after one that failed it is set anew."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.scenarios.deployment import Size
from tests.scenarios.stage import Scene


class Stagehand:
    """Sets the scene when it is needed, and anew after it broke."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._scene: Scene | None = None

    @contextlib.contextmanager
    def scene(self) -> Iterator[Scene]:
        """A scene that is whole and clean, for one story."""
        if self._scene is None:
            self._scene = Scene(self._folders.mktemp("scene"), Size()).__enter__()
        try:
            yield self._scene
        except BaseException:
            self.strike()
            raise

    def strike(self) -> None:
        """Ends every process of the scene."""
        if self._scene is not None:
            self._scene.__exit__()
            self._scene = None


@pytest.fixture(scope="session")
def stagehand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stagehand]:
    hand = Stagehand(tmp_path_factory)
    yield hand
    hand.strike()
