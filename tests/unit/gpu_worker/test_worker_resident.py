"""The slab holds what masks need, and a failed row overwrites nothing that is still needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.resident import EMPTY, Kind, LocalSlab, kinds_of
from longreach.errors import ResourceExhausted
from longreach.types import LayerGeometry, Span, retrieval_boundary

LAYERS = (LayerGeometry(0, 4, 2, 8, 8), LayerGeometry(1, 4, 2, 8, 6, sliding_window=40))


def slab(slots: int = 3, sink: int = 8, window: int = 40, row: int = 16) -> LocalSlab:
    return LocalSlab(
        LAYERS,
        slots=slots,
        sink=sink,
        window=window,
        max_row_tokens=row,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


sizes = st.tuples(st.integers(0, 70), st.integers(1, 200), st.integers(1, 130), st.integers(1, 90))


@settings(max_examples=100, deadline=None)
@given(sizes, st.integers(0, 2000), st.data())
def test_a_row_never_overwrites_what_its_session_still_needs(
    size: tuple[int, int, int, int], length: int, data: st.DataObject
) -> None:
    """Even at the position where the row failed, with the longest row."""
    sink, window, row, sliding = size
    count = data.draw(st.integers(1, row))
    layers = (LAYERS[0], LayerGeometry(1, 4, 2, 8, 8, sliding_window=sliding))
    for kind in kinds_of(layers, sink, window, row):
        written = kind.column_of(torch.arange(length, length + count))
        needed = [p for span in kind.resident(length, window) for p in range(span.start, span.stop)]
        unacknowledged = range(max(sink, retrieval_boundary(length, window)), length)
        needed = sorted({*needed, *unacknowledged})
        held = kind.column_of(torch.tensor(needed, dtype=torch.int64))
        assert int(written.max()) < kind.columns
        assert len(set(written.tolist())) == count
        assert not set(written.tolist()) & set(held.tolist())
        assert len(set(held.tolist())) == len(needed)


@given(sizes, st.integers(0, 2000))
def test_resident_positions_and_the_nodes_scope_cover_everything_once(
    size: tuple[int, int, int, int], length: int
) -> None:
    sink, window, row, _ = size
    (kind,) = kinds_of(LAYERS[:1], sink, window, row)
    boundary = max(sink, retrieval_boundary(length, window))
    held = [p for span in kind.resident(length, window) for p in range(span.start, span.stop)]
    scope = range(sink, boundary)
    assert sorted([*held, *(p for p in scope if p < length)]) == list(range(length))


def test_bytes_are_those_of_the_tensors() -> None:
    each = slab()
    full, sliding = each.kinds
    assert (full.columns, sliding.columns) == (8 + 128, 128)
    assert each.bytes_per_slot == 4 * 2 * (full.columns * (8 + 8) + sliding.columns * (8 + 6))
    allocated = sum(x.untyped_storage().nbytes() for x in (*each.keys, *each.values))
    assert allocated == 3 * each.bytes_per_slot


def test_slots_run_out_with_a_way_out() -> None:
    each = slab(slots=2)
    assert [each.acquire(), each.acquire()] == [0, 1]
    with pytest.raises(ResourceExhausted, match="--max-sessions"):
        each.acquire()
    each.release(0)
    assert each.slots_used == 1
    assert each.acquire() == 0


def test_what_is_placed_is_taken_back_and_forgotten_on_release() -> None:
    each = slab()
    slot = each.acquire()
    keys = np.random.default_rng(0).normal(size=(1, 30, 8)).astype(np.float32)
    each.place(0, slot, 100, 1, keys, keys)
    each.occupy(slot, 130)
    got, _ = each.take(0, slot, Span(100, 130))
    assert np.array_equal(got[1:].numpy(), keys)
    assert torch.equal(got[0], torch.zeros(30, 8))
    held = each.positions[0][slot]
    assert sorted(held[held != EMPTY].tolist()) == [*range(8), *range(64, 130)]
    window = each.positions[1][slot]
    assert sorted(window[window != EMPTY].tolist()) == list(range(90, 130))
    each.release(slot)
    assert all(bool((stored[slot] == EMPTY).all()) for stored in each.positions)


def test_layers_of_one_window_share_a_kind() -> None:
    layers = [LayerGeometry(i, 4, 2, 8, 8, sliding_window=w) for i, w in enumerate([0, 9, 0, 9])]
    assert kinds_of(layers, 4, 10, 1) == (Kind(0, 4, 128), Kind(9, 0, 128))
