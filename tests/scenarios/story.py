"""Stories: a title, then one step a line, indented. `#` begins a remark.

    A node is killed
        steady load
        kill node 1
        wait until served

Every story ends with the step `the end` (`steps.py`), which checks everything that must hold then.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from tests.scenarios.stage import Scene, Stage
from tests.scenarios.steps import find

STORIES = Path(__file__).with_name("stories.txt")
END = "the end"


class StoryFailed(AssertionError):
    """A step failed; says which one."""


@dataclass(frozen=True)
class Story:
    """A title and its steps."""

    title: str
    steps: tuple[str, ...]

    @property
    def slug(self) -> str:
        """The title as a test id."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())

    def play(self, scene: Scene) -> None:
        """Plays the story. Raises StoryFailed."""
        stage = Stage(scene)
        try:
            for words in (*self.steps, END):
                action, arguments = find(words)
                began = time.monotonic()
                try:
                    action(stage, **arguments)
                except Exception as error:
                    print(f"FAILED  {words}: {error}", flush=True)
                    raise StoryFailed(f"{self.title} / {words}: {error}") from error
                # pytest shows it with -s, and with what failed.
                print(f"{time.monotonic() - began:6.2f} s  {words}", flush=True)
        finally:
            if stage.load is not None:
                stage.load.abandon()


def parse(text: str) -> list[Story]:
    """The stories in a text. Raises ValueError for steps that do not exist, or without a story."""
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        words = line.partition("#")[0].strip()
        if not words:
            continue
        if not line[0].isspace():
            found.append((words, []))
        elif found:
            find(words)
            found[-1][1].append(words)
        else:
            raise ValueError(f"a step before the first title: {words!r}")
    return [Story(title, tuple(steps)) for title, steps in found]
