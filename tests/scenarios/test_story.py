"""The language of stories."""

from __future__ import annotations

import pytest

from tests.scenarios.steps import PHRASES, find
from tests.scenarios.story import END, STORIES, parse


def test_a_text_is_read_as_titles_and_steps() -> None:
    text = (
        "# remark\nOne thing: it breaks\n  kill node 1  # or 2\n\n  heal\nAnother\n  steady load\n"
    )
    one, another = parse(text)
    assert (one.title, one.steps) == ("One thing: it breaks", ("kill node 1", "heal"))
    assert one.slug == "one-thing-it-breaks"
    assert another.steps == ("steady load",)


@pytest.mark.parametrize(
    ("text", "says"),
    [("A story\n  dance\n", "dance"), ("  heal\n", "before the first title")],
)
def test_what_is_no_story_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(text)


def test_arguments_are_parts_of_the_phrase() -> None:
    _, arguments = find("slow the busiest node by 400 ms")
    assert arguments == {"who": "the busiest node", "milliseconds": "400"}
    _, arguments = find("cut worker 0 from the leader")
    assert arguments == {"one": "worker 0", "other": "the leader"}


def test_every_story_has_a_load_and_no_phrase_is_idle() -> None:
    stories = parse(STORIES.read_text())
    assert len({story.slug for story in stories}) == len(stories)
    assert all(story.steps[0] == "steady load" for story in stories)
    assert all(phrase.action.__doc__ for phrase in PHRASES)
    find(END)
