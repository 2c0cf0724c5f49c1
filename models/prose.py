"""Natural text for haystacks: Python's own documentation and standard library.

No corpus has to be downloaded. The text is the language reference that `help()` prints
(`pydoc_data.topics`) and the docstrings and sources of the standard library's modules. A topic or
module whose name hashes to the held-out part (`words.is_held_out`, one in three) is read only by
evaluation. The exact text depends on the Python version; the committed model used CPython 3.11.
"""

from __future__ import annotations

import ast
import importlib.util
import pydoc_data.topics
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from models.words import is_held_out

_SKIPPED_MODULES = frozenset({"antigravity", "this", "idlelib", "lib2to3", "pydoc_data", "test"})
_HELD_OUT_ONE_IN = 3
_SOURCE_CHARS_PER_MODULE_MAX = 40_000


def held_out_names() -> list[str]:
    """Names of the held-out topics and modules, for the model card."""
    topics = [f"topic:{name}" for name, _ in _topics(held_out=True)]
    return topics + [name for name, _ in _modules(held_out=True)]


@cache
def prose_text(held_out: bool) -> str:
    """Documentation topics and docstrings of one part, as one string (about 1 MB)."""
    texts = [text for _, text in _topics(held_out)]
    for _, paths in _modules(held_out):
        for path in paths:
            texts.extend(_docstrings(_read(path)))
    return "\n\n".join(texts)


@cache
def source_text(held_out: bool) -> str:
    """Library sources of one part, as one string; no module gives more than 40,000 characters."""
    return "\n\n".join(
        _read(path)[:_SOURCE_CHARS_PER_MODULE_MAX]
        for _, paths in _modules(held_out)
        for path in paths[:4]
    )


def _topics(held_out: bool) -> Iterator[tuple[str, str]]:
    for name, text in sorted(pydoc_data.topics.topics.items()):
        if is_held_out(name, _HELD_OUT_ONE_IN) == held_out:
            yield name, text


def _modules(held_out: bool) -> Iterator[tuple[str, list[Path]]]:
    """Standard-library modules of one part with their source files."""
    for name in sorted(sys.stdlib_module_names - _SKIPPED_MODULES):
        if is_held_out(name, _HELD_OUT_ONE_IN) != held_out:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue
        origin = Path(spec.origin)
        is_package = origin.name == "__init__.py"
        yield name, sorted(origin.parent.glob("*.py")) if is_package else [origin]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _docstrings(source: str) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, those worth reading as prose."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None and len(text) > 80:
                yield text
