"""Spans, scopes, budgets and work figures."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.types import (
    BFLOAT16,
    BOUNDARY_TOKENS,
    Budget,
    Identity,
    KvBlock,
    LayerGeometry,
    Shard,
    Span,
    WorkFigures,
    retrieval_boundary,
    retrieval_scope,
    storage_dtype,
    total_work,
)

positions = st.integers(0, 10_000)
spans = st.tuples(positions, positions).map(lambda pair: Span(min(pair), max(pair)))


@given(spans, spans)
def test_an_intersection_holds_exactly_the_positions_of_both(a: Span, b: Span):
    both = a.intersect(b)
    assert set(range(both.start, both.stop)) == (
        set(range(a.start, a.stop)) & set(range(b.start, b.stop))
    )


@given(spans, positions)
def test_a_position_is_in_a_span_when_it_is_in_its_range(span: Span, position: int):
    assert (position in span) == (position in range(span.start, span.stop))
    assert len(span) == len(range(span.start, span.stop))


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4)])
def test_a_span_that_ends_before_it_starts_or_starts_below_zero_is_refused(start, stop):
    with pytest.raises(ValueError, match="not a span"):
        Span(start, stop)


@given(st.integers(0, 200_000), st.integers(1, 4096))
def test_the_window_varies_by_less_than_a_boundary_block(tokens: int, window: int):
    boundary = retrieval_boundary(tokens, window)
    assert boundary % BOUNDARY_TOKENS == 0
    if tokens >= window:
        assert window <= tokens - boundary < window + BOUNDARY_TOKENS
    else:
        assert boundary == 0


@given(st.integers(0, 20_000), st.integers(0, 1024), st.integers(1, 4096))
def test_sink_scope_and_window_cover_every_position_once(tokens: int, sink: int, window: int):
    scope = retrieval_scope(tokens, sink, window)
    window_start = max(sink, retrieval_boundary(tokens, window))
    assert scope.start == sink
    assert scope.stop == window_start
    resident = min(sink, tokens) + max(0, tokens - window_start)
    assert resident + len(scope) == tokens


@pytest.mark.parametrize(
    "text",
    [
        "exact",
        "exact+tail",
        "top_k=100",
        "top_k=1+tail",
        "mass=0.98[0,0]",
        "mass=0.5[64,4096]+tail",
        "beta=8",
        "beta=2.5+tail",
    ],
)
def test_a_budget_reads_back_what_it_prints(text: str):
    assert str(Budget.parse(text)) == text
    assert Budget.parse(str(Budget.parse(text))) == Budget.parse(text)


@pytest.mark.parametrize(
    "text", ["", "top_k", "top_k=0", "mass=0", "mass=1.5", "top_k=3 4", "all", "beta=-1"]
)
def test_a_budget_that_makes_no_sense_is_refused(text: str):
    with pytest.raises(ValueError):  # noqa: PT011
        Budget.parse(text)


def test_a_budget_has_exactly_one_rule():
    with pytest.raises(ValueError, match="exactly one"):
        Budget()
    with pytest.raises(ValueError, match="exactly one"):
        Budget(top_k=5, beta=1.0)
    with pytest.raises(ValueError, match="beta is nan"):
        Budget(beta=float("nan"))


def test_work_figures_add_field_by_field():
    a = WorkFigures(10, 1, 2, 3, 100, 1000, 10)
    b = WorkFigures(30, 3, 4, 5, 300, 3000, 20)
    assert total_work([a, b]) == WorkFigures(40, 4, 6, 8, 400, 4000, 30)
    assert total_work([]) == WorkFigures()


def test_the_four_fractions_divide_by_what_was_in_scope():
    work = WorkFigures(
        keys_in_scope=1000,
        keys_scanned=100,
        keys_sketched=1000,
        keys_attended=50,
        bytes_read=2_000,
        bytes_in_scope=8_000,
        keys_covered=750,
    )
    assert work.scan_fraction == 0.1
    assert work.sketch_fraction == 1.0
    assert work.attended_fraction == 0.05
    assert work.bytes_fraction == 0.25
    assert work.coverage == 0.75


def test_an_empty_scope_is_fully_covered():
    assert WorkFigures().coverage == 1.0
    assert WorkFigures().scan_fraction == 0.0


def test_identities_name_the_fields_that_differ():
    a = Identity("llama", "abc", "bfloat16", tenant="t1")
    assert a.difference(a) == ""
    difference = a.difference(Identity("llama", "abd", "bfloat16", tenant="t2"))
    assert "revision 'abc' != 'abd'" in difference
    assert "tenant 't1' != 't2'" in difference
    assert "dtype" not in difference


def test_shapes_follow_from_geometry_shards_and_blocks():
    assert LayerGeometry(0, 32, 8, 128, 128).group == 4
    assert Shard("s", Span(0, 10), (0,), 2, 6, ("n",)).kv_heads == 4
    keys = np.zeros((2, 4, 7, 16), np.float32)
    assert KvBlock((0, 1), 0, 64, keys, keys).span == Span(64, 71)


def test_storage_dtypes_are_found_by_name_and_unknown_ones_list_the_known():
    assert storage_dtype("bfloat16") == BFLOAT16
    assert storage_dtype("float32") == np.float32
    with pytest.raises(ValueError, match="float32, float16, bfloat16"):
        storage_dtype("int8")
