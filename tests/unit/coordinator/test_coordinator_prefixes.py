"""The longest stored beginning of a prompt, against a search by comparison."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.prefixes import PrefixIndex
from longreach.types import BOUNDARY_TOKENS, Identity

IDENTITY = Identity("m", "r", "float32", tenant="t")

# Sequences out of few different blocks, so that beginnings are often shared.
blocks = st.lists(st.integers(0, 2), max_size=6).map(
    lambda kinds: [kind for kind in kinds for _ in range(BOUNDARY_TOKENS)]
)
sequences = st.tuples(blocks, st.lists(st.integers(0, 2), max_size=70)).map(
    lambda parts: parts[0] + parts[1]
)


def _shared_blocks(a: list[int], b: list[int]) -> int:
    shared = 0
    while shared < min(len(a), len(b)) and a[shared] == b[shared]:
        shared += 1
    return shared // BOUNDARY_TOKENS * BOUNDARY_TOKENS


@settings(max_examples=200, deadline=None)
@given(
    stored=st.lists(sequences, max_size=6),
    prompt=sequences,
    unusable=st.sets(st.integers(0, 5)),
    removed=st.sets(st.integers(0, 5)),
)
def test_the_longest_shared_beginning_is_found(stored, prompt, unusable, removed):
    index = PrefixIndex()
    for i, tokens in enumerate(stored):
        index.add(str(i), IDENTITY, tokens)
    for i in removed:
        index.remove(str(i))
    left = set(range(len(stored))) - unusable - removed
    best = max((_shared_blocks(stored[i], prompt) for i in left), default=0)
    found = index.longest(IDENTITY, prompt, usable=lambda name: int(name) not in unusable)
    if best == 0:
        assert found is None
    else:
        name, stop = found
        assert stop == best
        assert int(name) in left
        assert stored[int(name)][:stop] == prompt[:stop]


def test_contexts_of_another_identity_are_never_found():
    index = PrefixIndex()
    tokens = [1] * 640
    index.add("ctx", IDENTITY, tokens)
    assert index.longest(IDENTITY, tokens) == ("ctx", 640)
    for field in ("model", "revision", "dtype", "rope_regime", "prefill", "tenant"):
        other = dataclasses.replace(IDENTITY, **{field: "other"})
        assert index.longest(other, tokens) is None


def test_removing_a_context_leaves_nothing_behind():
    index = PrefixIndex()
    index.add("ctx", IDENTITY, [1] * 640)
    index.remove("ctx")
    index.remove("ctx")
    assert "ctx" not in index
    assert index.longest(IDENTITY, [1] * 640) is None
    index.add("ctx", IDENTITY, [1] * 128)
    assert index.longest(IDENTITY, [1] * 640) == ("ctx", 128)
