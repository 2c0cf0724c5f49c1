"""One scene for all stories; a story that leaves it broken costs the next one a new scene."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.scenarios.deployment import Size
from tests.scenarios.stage import CLEAN_TIMEOUT_S, Scene, wait_for


class Stagehand:
    """Sets the scene when it is needed, and anew after it broke."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._scene: Scene | None = None

    def scene(self) -> Scene:
        """A scene that is whole and clean."""
        if self._scene is None:
            scene = Scene(self._folders.mktemp("scene"), Size())
            self._scene = scene.__enter__()
        return self._scene

    def strike(self) -> None:
        """Ends every process of the scene."""
        if self._scene is not None:
            self._scene.__exit__()
            self._scene = None

    def tidy(self) -> None:
        """Makes the scene ready for the next story, or ends it."""
        if self._scene is None:
            return
        try:
            self._scene.wait_whole()
            wait_for(self._scene.clean, CLEAN_TIMEOUT_S, self._scene.what_is_left)
        except Exception:
            self.strike()


@pytest.fixture(scope="session")
def stagehand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stagehand]:
    hand = Stagehand(tmp_path_factory)
    yield hand
    hand.strike()


@pytest.fixture
def scene(stagehand: Stagehand) -> Iterator[Scene]:
    """The scene of all stories, whole and clean."""
    yield stagehand.scene()
    stagehand.tidy()
