"""docs/library.md is run block by block; what it says it prints is what it prints."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from library.decode import DECODE_METHODS

ROOT = Path(__file__).parents[3]
TUTORIAL = ROOT / "docs" / "library.md"
_BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def added_methods() -> Iterator[None]:
    """Methods that the tutorial registers are gone afterwards."""
    before = dict(DECODE_METHODS._entries)
    yield
    DECODE_METHODS._entries.clear()
    DECODE_METHODS._entries.update(before)


@pytest.mark.usefixtures("added_methods")
def test_the_tutorial_runs_and_prints_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = TUTORIAL.read_text(encoding="utf-8")
    blocks = [(match[1], match[2], text.count("\n", 0, match.start()) + 2)
              for match in _BLOCK.finditer(text)]  # fmt: skip
    assert [kind for kind, _, _ in blocks].count("python") >= 8
    namespace: dict[str, object] = {"__name__": "tutorial"}
    printed = ""
    for kind, block, line in blocks:
        if kind == "text":
            assert printed == block, f"{TUTORIAL.name}, line {line}"
            continue
        # Blank lines in front, so that a traceback names the tutorial's own line.
        code = compile("\n" * (line - 1) + block, str(TUTORIAL), "exec", dont_inherit=True)
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(code, namespace)
        printed = output.getvalue()
