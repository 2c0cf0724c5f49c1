"""Every decode method: with room for everything it is full attention, and what it chooses with
less is what its paper says, written out position by position."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from library.decode import DECODE_METHODS, decode_names, parse_decode
from longreach.errors import FailedPrecondition, InvalidRequest
from tests.unit.library.library_layers import (
    CONTEXT,
    GROUP,
    KV_HEADS,
    Q_HEADS,
    TAIL,
    Scene,
)

Chosen = Callable[[int, int], set[int]]

EVERYTHING = {
    "full": "full",
    "streaming_llm": "streaming_llm:sink=3,window=10000",
    "dilated": "dilated:sink=3,window=10000,interval=0",
    "strided": "strided:sink=3,window=40,dilated=10000,interval=0",
    "snapkv": "snapkv:capacity=10000,window=8",
    "static_top_k": "static_top_k:top_k=10000,window=8",
    "quest": "quest:budget=10000,page=16",
    "infllm": "infllm:sink=5,window=20,block=16,blocks=1000",
    **{
        kind: f"{kind}:exact,sink=5,window=20"
        for kind in ("auto", "flat", "hnsw", "ivf", "kmeans", "roargraph", "sketch")
    },
}


def best(scores: dict[int, float], count: int) -> set[int]:
    return set(sorted(scores, key=lambda each: -scores[each])[:count])


def positional(keep: Callable[[int, int], bool]) -> Callable[[Scene], Chosen]:
    """Chosen by position p and the number of positions seen alone."""
    return lambda scene: lambda head, row: {p for p in range(scene.seen) if keep(p, scene.seen)}


def window_mass(scene: Scene, head: int, window: int) -> np.ndarray:
    """Attention that the context's last `window` queries give each of its positions."""
    mass = np.zeros(scene.context)
    for row in range(scene.context - window, scene.context):
        logits = np.array([scene.logit(head, row, p) for p in range(row + 1)])
        mass[: row + 1] += np.exp(logits) / np.exp(logits).sum()
    return mass


def snapkv(pool: Callable[[np.ndarray], float]) -> Callable[[Scene], Chosen]:
    """Capacity 30, window 6, kernel 5."""

    def choose(scene: Scene) -> Chosen:
        prefix = scene.context - 6
        kept = {}
        for head in range(Q_HEADS):
            mass = window_mass(scene, head, 6)[:prefix]
            votes = {p: pool(mass[max(0, p - 2) : p + 3]) for p in range(prefix)}
            kept[head] = best(votes, 24) | set(range(prefix, scene.seen))
        return lambda head, row: kept[head]

    return choose


def static_top_k(scene: Scene) -> Chosen:
    """Top 12 of the last 9 queries."""
    prefix = scene.context - 9
    kept = {}
    for head in range(Q_HEADS):
        mass = window_mass(scene, head, 9)
        kept[head] = best({p: mass[p] for p in range(prefix)}, 12)
    return lambda head, row: kept[head] | set(range(prefix, scene.seen))


def quest(scene: Scene) -> Chosen:
    """Budget 48 in pages of 16."""
    queries, keys, _ = (each.numpy() for each in scene.tensors)

    def choose(head: int, row: int) -> set[int]:
        bounds = {}
        for page in range(0, scene.context, 16):
            held = keys[head // GROUP, page : min(page + 16, scene.context)]
            query = queries[head, row]
            bounds[page] = sum(
                max(q * low, q * high)
                for q, low, high in zip(query, held.min(0), held.max(0), strict=True)
            )
        pages = best(bounds, 3)
        old = {p for page in pages for p in range(page, min(page + 16, scene.context))}
        return old | set(range(scene.context, scene.seen))

    return choose


def infllm(scene: Scene) -> Chosen:
    """Sink 5, window 20, blocks of 16, 3 of them, by 2 representatives."""
    first = min(scene.seen - 20, scene.context)
    relevance = {}
    for block in range(0, scene.context, 16):
        held = range(block, min(block + 16, scene.context))
        relevance[block] = 0.0
        for kv in range(KV_HEADS):
            heads = range(kv * GROUP, kv * GROUP + GROUP)
            scores = {}
            for p in held:
                after = range(p + 1, min(p + 21, scene.context))
                votes = [scene.products[h, a, p] for h in heads for a in after]
                scores[p] = float(np.mean(votes)) if votes else 0.0
            for p in best(scores, 2):
                relevance[block] += sum(
                    float(scene.products[h, scene.seen + r, p])
                    for h in heads
                    for r in range(scene.rows)
                )
    searched = {b: r for b, r in relevance.items() if b < first and b + 16 > 5}
    chosen = {p for b in best(searched, 3) for p in range(b, b + 16) if 5 <= p < first}
    kept = set(range(5)) | chosen | set(range(first, scene.seen))
    return lambda head, row: kept


def exact_top_k(scene: Scene) -> Chosen:
    """Top 15 of each head and row; sink 5, window 20 from a multiple of 64 on."""
    boundary = (scene.seen - 20) // 64 * 64
    resident = set(range(5)) | set(range(boundary, scene.seen))
    return lambda head, row: (
        resident | best({p: scene.logit(head, row, p) for p in range(5, boundary)}, 15)
    )


LITERAL: dict[str, Callable[[Scene], Chosen]] = {
    "full": positional(lambda p, seen: True),
    "streaming_llm:sink=4,window=30": positional(lambda p, seen: p < 4 or p >= seen - 30),
    "streaming_llm:sink=4,window=3": positional(lambda p, seen: p < 4 or p >= seen - 3),
    "dilated:sink=4,window=50,interval=2": positional(
        lambda p, seen: p < 4 or (p >= seen - 50 and (seen - p) % 3 == 0)
    ),
    "strided:sink=4,window=20,dilated=50,interval=1": positional(
        lambda p, seen: p < 4 or p >= seen - 20 or (p >= seen - 70 and (seen - 20 - p) % 2 == 0)
    ),
    "snapkv:capacity=30,window=6,kernel=5": snapkv(lambda votes: float(votes.max())),
    "snapkv:capacity=30,window=6,kernel=5,pooling=avg": snapkv(lambda v: float(v.sum() / 5)),
    "static_top_k:top_k=12,window=9": static_top_k,
    "quest:budget=48,page=16": quest,
    "infllm:sink=5,window=20,block=16,blocks=3,representatives=2": infllm,
    "flat:top_k=15,sink=5,window=20": exact_top_k,
}


def test_every_method_is_held_to_full_attention_and_to_its_paper() -> None:
    assert set(EVERYTHING) == set(decode_names())
    described = {text.partition(":")[0] for text in LITERAL}
    assert described >= set(DECODE_METHODS) - {"retrieval"}


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("text", EVERYTHING.values(), ids=EVERYTHING)
def test_with_room_for_everything_it_is_full_attention(
    text: str, rows: int, softcap: float
) -> None:
    scene = Scene(seed=1, rows=rows, softcap=softcap)
    attended = scene.attend(parse_decode(text))
    want = scene.literal(lambda head, row: set(range(scene.seen)))
    torch.testing.assert_close(attended.partial.output, want, atol=2e-5, rtol=1e-4)
    assert attended.work.attended_fraction == 1
    assert attended.work.keys_in_scope == rows * KV_HEADS * scene.seen


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("text", LITERAL)
def test_it_attends_what_its_paper_says_position_by_position(text: str, rows: int) -> None:
    for seed in range(2):
        scene = Scene(seed=seed, rows=rows)
        chosen = LITERAL[text](scene)
        attended = scene.attend(parse_decode(text))
        torch.testing.assert_close(
            attended.partial.output, scene.literal(chosen), atol=2e-5, rtol=1e-4
        )
        assert attended.work.keys_attended == scene.pairs(chosen)


def test_the_question_behind_a_stored_context_chooses_for_snapkv() -> None:
    scene = Scene(seed=3)
    queries, keys, _ = scene.tensors
    question = slice(CONTEXT, CONTEXT + TAIL - 1)
    layer = scene.layer().asked(keys[:, question], queries[:, question])
    attended = scene.attend(parse_decode("snapkv:capacity=20,window=4,kernel=3"), layer)

    def chosen(head: int, row: int) -> set[int]:
        mass = np.zeros(CONTEXT)
        for asking in range(question.stop - 4, question.stop):
            logits = np.array([scene.logit(head, asking, p) for p in range(asking + 1)])
            mass += (np.exp(logits) / np.exp(logits).sum())[:CONTEXT]
        prefix = CONTEXT - 4
        votes = {p: float(mass[max(0, p - 1) : min(p + 2, prefix)].max()) for p in range(prefix)}
        return best(votes, 16) | set(range(prefix, scene.seen))

    torch.testing.assert_close(attended.partial.output, scene.literal(chosen), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("text", EVERYTHING.values(), ids=EVERYTHING)
@pytest.mark.parametrize("context", [1, 6])
def test_a_context_shorter_than_sink_and_window_is_attended_whole(text: str, context: int) -> None:
    scene = Scene(seed=5, context=context)
    attended = scene.attend(parse_decode(text))
    want = scene.literal(lambda head, row: set(range(scene.seen)))
    torch.testing.assert_close(attended.partial.output, want, atol=2e-5, rtol=1e-4)


def test_the_first_layers_of_quest_are_dense() -> None:
    scene = Scene(seed=2)
    attended = scene.attend(parse_decode("quest:budget=16,page=16,dense_layers=6"))
    want = scene.literal(lambda head, row: set(range(scene.seen)))
    torch.testing.assert_close(attended.partial.output, want, atol=2e-5, rtol=1e-4)


def test_methods_that_share_an_index_build_it_once() -> None:
    layer = Scene(seed=0).layer()
    first, second = (
        parse_decode(text).prepare(layer) for text in ("sketch:top_k=5", "sketch:mass=0.9")
    )
    assert first._index is second._index  # type: ignore[union-attr]


def test_what_chooses_by_queries_says_when_it_has_seen_none() -> None:
    scene = Scene()
    layer = scene.layer()
    blind = layer.queries.__class__(
        layer.queries.last[:, :0], layer.queries.positions, layer.queries.sampled
    )
    unseen = layer.__class__(
        layer.geometry, layer.keys, layer.values, blind, layer.call, layer.after
    )
    for text in ("snapkv:capacity=20,window=4", "infllm:window=20"):
        with pytest.raises(FailedPrecondition, match="attach before the prompt is run"):
            scene.attend(parse_decode(text), unseen)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h2o", "unknown decode method 'h2o'; known: dilated, full, .*snapkv.*roargraph"),
        ("snapkv:top_k=4", "it has no parameter 'top_k'; it has capacity, window, kernel, pooling"),
        ("snapkv:capacity=many", "capacity is 'many', which is not int"),
        ("snapkv:kernel=4", "kernel is 4; it must be odd"),
        ("snapkv:pooling=sum", "pooling is 'sum'; it must be max or avg"),
        ("snapkv:capacity=30,window=30", "window is 30; it must be below capacity"),
        ("static_top_k:window=500", "window is 500; it is at most 128"),
        ("streaming_llm:sink=-1", "sink is -1; it must be at least 0"),
        ("quest:budget=8", "budget is 8; it must be at least 16"),
        ("sketch:top_k=0", "top_k is 0; it must be at least 1"),
        ("sketch:best=3", "'best=3' is not a budget; write exact, top_k=100"),
        ("sketch:top_k=3,exact", "it names 2 budgets, top_k=3 and exact"),
    ],
)
def test_a_wrong_method_is_refused_with_what_is_right(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse_decode(text)


@pytest.mark.parametrize("text", [*LITERAL, "roargraph:mass=0.98[64,4096]+tail,window=256"])
def test_a_methods_text_names_every_parameter_and_reads_back(text: str) -> None:
    method = parse_decode(text)
    assert parse_decode(str(method)) == method
    for name, value in method.parameters().items():
        if name != "index":
            assert str(value) in str(method)
