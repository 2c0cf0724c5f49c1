"""Registries find plug-ins by name and list the names when there is none."""

import pytest

from longreach.errors import InvalidRequest
from longreach.registry import Registry


def test_an_entry_is_found_under_its_name_and_returned_unchanged():
    kinds: Registry[type] = Registry("index kind")

    @kinds.register("flat")
    class Flat:
        pass

    assert kinds["flat"] is Flat
    assert "flat" in kinds
    assert "graph" not in kinds


def test_names_come_sorted():
    kinds: Registry[int] = Registry("kind")
    for name in ("b", "c", "a"):
        kinds.register(name)(ord(name))
    assert list(kinds) == ["a", "b", "c"]
    assert len(kinds) == 3


def test_an_unknown_name_lists_the_known():
    kinds: Registry[int] = Registry("placement policy")
    kinds.register("layer")(1)
    kinds.register("head_group")(2)
    with pytest.raises(InvalidRequest, match="unknown placement policy 'rows'; known: head_group,"):
        kinds["rows"]


def test_a_name_is_taken_once():
    kinds: Registry[int] = Registry("kind")
    kinds.register("a")(1)
    with pytest.raises(ValueError, match="registered already"):
        kinds.register("a")(2)
    assert kinds["a"] == 1
