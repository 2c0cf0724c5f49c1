"""Every story of stories.txt, on one cluster of real processes with mutual TLS."""

from __future__ import annotations

import pytest

from tests.scenarios.conftest import Stagehand
from tests.scenarios.story import STORIES, Story, parse

# A busy machine starts processes slowly, and some stories restart many.
pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

_STORIES = parse(STORIES.read_text())


@pytest.mark.parametrize("story", _STORIES, ids=lambda story: story.slug)
def test_story(story: Story, stagehand: Stagehand) -> None:
    with stagehand.scene() as scene:
        story.play(scene)
