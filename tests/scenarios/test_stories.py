"""Every story of stories.txt, on one cluster of real processes with mutual TLS."""

from __future__ import annotations

import pytest

from tests.scenarios.conftest import Stagehand
from tests.scenarios.story import STORIES, Story, parse

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

_STORIES = parse(STORIES.read_text())


@pytest.mark.parametrize("story", _STORIES, ids=lambda story: story.slug)
def test_story(story: Story, stagehand: Stagehand) -> None:
    with stagehand.scene() as scene:
        story.play(scene)
