"""Whatever shapes, scopes and budgets arrive, the kernels answer or raise ValueError."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longreach.types import Budget, PartialAttention
from retrieval_node import kernel
from retrieval_node.index.sketch_fit import fit_sketch
from retrieval_node.kernel import KernelRows, KvRows

STORAGES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

sizes = st.integers(0, 5)
budgets = st.one_of(
    st.just(Budget(exact=True)),
    st.builds(lambda k, t: Budget(top_k=k, tail_estimate=t), st.integers(1, 2**62), st.booleans()),
    st.builds(
        lambda m, f, c, t: Budget(mass=m, floor=f, ceiling=c, tail_estimate=t),
        st.floats(1e-9, 1.0),
        st.integers(0, 2**62),
        st.integers(0, 2**62),
        st.booleans(),
    ),
    st.builds(lambda b: Budget(beta=b), st.floats(0, 1e30)),
)
numbers = st.one_of(st.integers(-3, 8), st.integers(-(2**63), 2**63 - 1))


@st.composite
def arrays(draw, dims):
    """Floats of a shape close to right: sometimes an axis too many or too few, or odd strides."""
    shape = draw(st.lists(sizes, min_size=max(0, dims - 1), max_size=dims + 1))
    if draw(st.booleans()):
        shape = [draw(sizes) for _ in range(dims)]
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    array = rng.standard_normal(shape).astype(np.float32)
    change = draw(st.sampled_from(["none", "none", "nan", "reversed", "strided", "broadcast"]))
    if change == "nan" and array.size:
        array.flat[0] = np.nan
    elif change == "reversed" and array.ndim:
        array = array[::-1]
    elif change == "strided" and array.ndim:
        array = np.repeat(array, 2, axis=-1)[..., ::2]
    elif change == "broadcast" and array.ndim:
        array = np.broadcast_to(array[..., :1], array.shape) if array.shape[-1] else array
    return array


@st.composite
def layers(draw):
    """Keys and values, mostly of shapes that fit."""
    storage = draw(st.sampled_from(STORAGES))
    if draw(st.booleans()):
        return draw(arrays(3)).astype(storage), draw(arrays(3)).astype(storage)
    heads, n, dim, value_dim = (
        draw(sizes),
        draw(st.integers(0, 200)),
        *draw(st.tuples(sizes, sizes)),
    )
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    keys = rng.standard_normal((heads, n, dim)).astype(storage)
    return keys, rng.standard_normal((heads, n, value_dim)).astype(storage)


@st.composite
def batches(draw, keys):
    """Entries, mostly of shapes that fit the keys."""
    batch = []
    for _ in range(draw(st.integers(0, 3))):
        queries = draw(arrays(4))
        if keys.ndim == 3 and draw(st.booleans()):
            rng = np.random.default_rng(draw(st.integers(0, 1000)))
            shape = (draw(sizes), draw(st.integers(0, keys.shape[0])), draw(st.integers(0, 11)))
            queries = rng.standard_normal((*shape, keys.shape[2]), np.float32)
        floor = None
        if draw(st.booleans()):
            right = np.zeros(queries.shape[:3], np.float32)
            floor = draw(st.one_of(st.just(right), arrays(3)))
        start, stop = draw(numbers), draw(numbers)
        if keys.ndim == 3 and draw(st.booleans()):
            start = draw(st.integers(0, keys.shape[1]))
            stop = draw(st.integers(start, keys.shape[1]))
        batch.append(KernelRows(queries, draw(numbers), start, stop, draw(budgets), floor))
    return batch


def answered(call, batch, value_dim):
    """What a kernel that takes entries answers to the rows."""
    entries = [kernel.entry(*rows, value_dim) for rows in batch]
    figures, _ = call(entries)
    assert len(figures) == len(entries)
    return [PartialAttention(entry.output, entry.lse) for entry in entries]


def answers_or_value_error(call, batch):
    try:
        answers = call()
    except ValueError:
        return
    for rows, partial in zip(batch, answers, strict=True):
        assert partial.lse.shape == rows.queries.shape[:3]
        assert partial.output.shape[:3] == rows.queries.shape[:3]
        seen = np.isfinite(partial.lse)
        assert np.isfinite(partial.output[seen]).all() or not np.isfinite(partial.output).all()


scales = st.one_of(st.floats(-2, 2), st.sampled_from([np.nan, np.inf, 1e30]))
softcaps = st.sampled_from([0.0, 5.0, -1.0, np.nan])


@pytest.fixture(params=kernel.supported_isas(), autouse=True, scope="module")
def tier(request):
    before = kernel.isa()
    kernel.set_isa(request.param)
    yield request.param
    kernel.set_isa(before)


@FUZZ
@given(st.data())
def test_exact_attention_answers_or_refuses(data):
    keys, values = data.draw(layers())
    batch = data.draw(batches(keys))
    scale, softcap = data.draw(scales), data.draw(softcaps)
    answers_or_value_error(lambda: kernel.attend_exact(keys, values, batch, scale, softcap), batch)


@FUZZ
@given(st.data())
def test_exact_attention_over_many_pairs_answers_or_refuses(data):
    pairs = []
    for _ in range(data.draw(st.integers(0, 3))):
        keys, values = data.draw(layers())
        pairs.append(KvRows(keys, values, data.draw(batches(keys))))
    scale, softcap = data.draw(scales), data.draw(softcaps)
    answers_or_value_error(
        lambda: [p for parts in kernel.attend_exact_pairs(pairs, scale, softcap) for p in parts],
        [rows for pair in pairs for rows in pair.batch],
    )


@FUZZ
@given(st.data())
def test_budgeted_attention_answers_or_refuses(data):
    keys, values = data.draw(layers())
    batch = data.draw(batches(keys))
    scale, softcap, wanted = data.draw(scales), data.draw(softcaps), data.draw(st.booleans())
    answers_or_value_error(
        lambda: answered(
            lambda entries: kernel.attend_scope(keys, values, entries, scale, softcap, wanted),
            batch,
            values.shape[-1],
        ),
        batch,
    )


@FUZZ
@given(st.data())
def test_attention_over_candidates_answers_or_refuses(data):
    keys, values = data.draw(layers())
    batch = data.draw(batches(keys))
    candidates = [
        (
            np.array(data.draw(st.lists(st.integers(-2, 30), max_size=12)), np.int64),
            np.array(data.draw(st.lists(st.integers(-2, 250), max_size=20)), np.int32),
        )
        for _ in batch
    ]
    answers_or_value_error(
        lambda: answered(
            lambda entries: kernel.attend_candidates(keys, values, entries, candidates, 0.5),
            batch,
            values.shape[-1],
        ),
        batch,
    )


@FUZZ
@given(st.data())
def test_a_sketch_answers_or_refuses(data):
    keys, values = data.draw(layers())
    batch = data.draw(batches(keys))
    scale, softcap, wanted = data.draw(scales), data.draw(softcaps), data.draw(st.booleans())

    def attend():
        if keys.ndim != 3 or values.ndim != 3:
            raise ValueError("no heads to fit")
        heads = [fit_sketch(k, v, None) for k, v in zip(keys, values, strict=True)]
        layer = kernel.SketchLayer(keys, values, heads)
        return answered(
            lambda entries: layer.attend(entries, scale, softcap, wanted), batch, values.shape[-1]
        )

    answers_or_value_error(attend, batch)


@pytest.fixture(scope="module")
def long_sketch():
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((2, 6_007, 16), np.float32)
    return keys, [fit_sketch(k, k, None) for k in keys]


@FUZZ
@given(
    budget=budgets,
    edges=st.lists(st.integers(0, 6_007), min_size=2, max_size=2).map(sorted),
    group=st.integers(1, 10),
    stretch=st.sampled_from([0.0, 1e-20, 0.1, 1.0, 30.0, 1e4, 1e20]),
    softcap=st.sampled_from([0.0, 0.0, 30.0, 1e-3]),
    floor=st.sampled_from([None, -np.inf, 0.0, 3.0, np.inf]),
)
def test_a_long_scope_is_searched_whatever_the_budget_and_the_logits(
    long_sketch, budget, edges, group, stretch, softcap, floor
):
    keys, heads = long_sketch
    rng = np.random.default_rng(group)
    queries = (stretch * rng.standard_normal((2, 2, group, 16))).astype(np.float32)
    floors = None if floor is None else np.full(queries.shape[:3], floor, np.float32)
    entry = kernel.entry(queries, 0, *edges, budget, floors, 16)
    layer = kernel.SketchLayer(keys, keys, heads)
    _, [selected] = layer.attend([entry], 1.0, softcap, True)
    assert not np.isnan(entry.lse).any()
    assert np.isfinite(entry.output).all()
    for ids in selected:
        assert (np.diff(ids) > 0).all()
        assert len(ids) == 0 or (edges[0] <= ids[0] and ids[-1] < edges[1])


@pytest.mark.parametrize("drop", ["codes", "summaries", "model"])
def test_a_sketch_of_other_keys_is_refused(drop):
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((1, 100, 16), np.float32)
    code = fit_sketch(keys[0], keys[0], None)
    parts = {name: getattr(code, name) for name in ("codes", "summaries", "model")}
    parts[drop] = parts[drop][:-1]
    short = kernel.SketchCode(code.eight, code.four, **parts)
    with pytest.raises(ValueError, match=drop):
        kernel.SketchLayer(keys, keys, [short])
