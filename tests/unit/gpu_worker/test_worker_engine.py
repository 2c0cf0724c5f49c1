"""The engine over real retrieval nodes: exact answers, sessions that move, failures that are told.

The nodes are real ones over loopback gRPC; the reference is eager attention without any cache.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from worker_cluster import Cluster, close_capability, cluster, feed, last_progress
from worker_doubles import wait_until
from worker_models import FAMILIES, eager_logits, random_model, random_module, random_tokens

from gpu_worker.engine import Engine
from gpu_worker.model import prepare_model
from longreach.errors import (
    Cancelled,
    CoverageTooLow,
    IdentityMismatch,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    StaleEpoch,
    Unavailable,
)
from longreach.steps import StepRow
from longreach.types import Identity

CONTEXT = 260
PATIENCE_S = 20
"""For what other threads do meanwhile, on a machine that is busy."""

TOKENS = random_tokens(CONTEXT + 200)


def assert_follows(
    engine: Engine, want: torch.Tensor, start: int, stops: list[int], session_id: str = "s"
) -> None:
    """Feeds TOKENS up to each stop; the most likely tokens are the reference's, up to near ties."""
    for stop in stops:
        result = feed(engine, start, TOKENS[start:stop], session_id).results[0]
        assert result.error is None
        logprobs = torch.log_softmax(want[stop - 1], -1)
        tokens, got = zip(*result.top_logprobs, strict=True)
        assert got == pytest.approx(torch.topk(logprobs, 5).values.tolist(), abs=2e-4)
        assert got == pytest.approx(logprobs[list(tokens)].tolist(), abs=2e-4)
        assert result.coverage == 1.0
        start = stop


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_equal_eager_attention_over_real_nodes(family: str) -> None:
    model = random_model(family)
    want = eager_logits(model, TOKENS)
    with cluster(model) as nodes:
        engine = nodes.engine()
        to = nodes.prefill(engine, TOKENS[:CONTEXT])
        stop, resident_bytes = nodes.open(engine, to, CONTEXT)
        assert stop == CONTEXT
        assert resident_bytes == engine.status().resident_used_bytes > 0
        stops = [CONTEXT + 30, *range(CONTEXT + 31, CONTEXT + 95)]
        assert_follows(engine, want, CONTEXT, stops)


def test_bfloat16_answers_agree_within_their_rounding() -> None:
    module = random_module("qwen3").to(torch.bfloat16)
    model = prepare_model(module, "half", torch.device("cpu"))
    want = torch.log_softmax(eager_logits(model, TOKENS).float(), -1)
    with cluster(model) as nodes:
        engine = nodes.engine()
        to = nodes.prefill(engine, TOKENS[:CONTEXT])
        nodes.open(engine, to, CONTEXT)
        for at in range(CONTEXT, CONTEXT + 80):
            result = feed(engine, at, TOKENS[at : at + 1]).results[0]
            tokens, got = zip(*result.top_logprobs, strict=True)
            assert got == pytest.approx(want[at][list(tokens)].tolist(), abs=0.1)


@pytest.mark.parametrize("policy", ["span_and_head", "replicated"])
def test_any_placement_gives_the_same_answers(policy: str) -> None:
    model = random_model("gemma2")
    want = eager_logits(model, TOKENS)
    with cluster(model, nodes=3) as nodes:
        engine = nodes.engine()
        to = nodes.prefill(engine, TOKENS[:CONTEXT], policy)
        nodes.open(engine, to, CONTEXT)
        assert_follows(engine, want, CONTEXT, [CONTEXT + 9, *range(CONTEXT + 10, CONTEXT + 90)])


@pytest.mark.parametrize("stop", [1, 100, 128, 259])
def test_a_session_may_use_any_prefix_of_a_context(stop: int) -> None:
    model = random_model("llama")
    want = eager_logits(model, TOKENS)
    with cluster(model) as nodes:
        engine = nodes.engine()
        to = nodes.prefill(engine, TOKENS[:CONTEXT], "span_and_head")
        nodes.open(engine, to, stop)
        assert_follows(engine, want, stop, [stop + 17, *range(stop + 18, stop + 40)])


def test_a_session_without_a_context_lives_in_its_tail() -> None:
    model = random_model("llama")
    want = eager_logits(model, TOKENS)
    with cluster(model) as nodes:
        engine = nodes.engine()
        to = nodes.destination(0)
        assert nodes.open(engine, replace(to, context_id=""), 0)[0] == 0
        assert_follows(engine, want, 0, list(range(32, 300, 32)))


def test_another_worker_takes_a_session_over_where_the_nodes_stand() -> None:
    model = random_model("gemma3")
    want = eager_logits(model, TOKENS)
    with cluster(model) as nodes:
        first, second = nodes.engine(), nodes.engine()
        to = nodes.prefill(first, TOKENS[:CONTEXT])
        nodes.open(first, to, CONTEXT)
        assert_follows(first, want, CONTEXT, list(range(CONTEXT + 1, CONTEXT + 81)))
        stop = _settled(nodes, second, to, CONTEXT + 80)
        assert_follows(second, want, stop, list(range(stop + 1, stop + 40)))
        deadline = time.monotonic() + PATIENCE_S
        error = None
        while error is None and time.monotonic() < deadline:
            error = feed(first, CONTEXT + 80, TOKENS[CONTEXT + 80 : CONTEXT + 81]).results[0].error
        assert isinstance(error, StaleEpoch)


@pytest.mark.parametrize("policy", ["replicated", "replicated_heads"])
def test_a_node_that_lost_a_tail_is_given_it_again_by_another(policy: str) -> None:
    model = random_model("gemma3")
    want = eager_logits(model, TOKENS)
    stops = list(range(CONTEXT + 1, CONTEXT + 81))
    with cluster(model) as nodes:
        engine = nodes.engine()
        to = nodes.prefill(engine, TOKENS[:CONTEXT], policy)
        known = TOKENS[CONTEXT : CONTEXT + 81]
        nodes.open(engine, to, CONTEXT, known=known)
        assert_follows(engine, want, CONTEXT, stops)
        wait_until(lambda: engine._appends.acknowledged("s") == CONTEXT + 80)
        store = nodes.nodes["n0"].store
        assert store.close_session_id("s", close_capability("s")) > 0
        stop, _ = nodes.open(engine, to, CONTEXT, epoch=2, known=known)
        assert stop == CONTEXT + 80
        assert store.stats().tail_bytes > 0
        # Now the one that gave it is gone, and nothing is missing.
        nodes.nodes["n1"].stop()
        assert_follows(engine, want, stop, list(range(stop + 1, stop + 60)))


def test_a_session_stands_before_the_last_token_that_is_known() -> None:
    model = random_model("llama")
    with cluster(model) as nodes:
        engine = nodes.engine()
        to = nodes.prefill(engine, TOKENS[:CONTEXT])
        nodes.open(engine, to, CONTEXT, known=TOKENS[CONTEXT : CONTEXT + 5])
        feed(engine, CONTEXT, TOKENS[CONTEXT : CONTEXT + 5])
        time.sleep(0.2)
        stop, _ = nodes.open(engine, to, CONTEXT, epoch=2, known=TOKENS[CONTEXT : CONTEXT + 5])
        assert stop == CONTEXT + 4
        other = (*TOKENS[CONTEXT : CONTEXT + 2], TOKENS[CONTEXT + 2] + 1, 9, 9)
        assert nodes.open(engine, to, CONTEXT, epoch=3, known=other)[0] == CONTEXT + 2


def _settled(nodes: Cluster, engine: Engine, to: object, expected: int) -> int:
    """Takes the session over once its tail has arrived on the nodes."""
    deadline = time.monotonic() + PATIENCE_S
    epoch = 2
    while (stop := nodes.open(engine, to, CONTEXT, epoch=epoch)[0]) < expected:  # type: ignore[arg-type]
        assert time.monotonic() < deadline
        epoch += 1
    return stop


def test_sessions_share_steps_and_each_gets_its_own_answer() -> None:
    model = random_model("qwen3")
    want = eager_logits(model, TOKENS)
    with cluster(model) as nodes:
        engine = nodes.engine()
        to = nodes.prefill(engine, TOKENS[:CONTEXT])
        at = {"a": CONTEXT, "b": 130, "c": 65}
        for name, stop in at.items():
            nodes.open(engine, to, stop, name)
        for counts in [{"a": 20, "b": 1, "c": 20}, *[{"a": 1, "b": 1, "c": 1}] * 30]:
            rows = [
                StepRow(name, at[name], TOKENS[at[name] : at[name] + count], True, 1)
                for name, count in counts.items()
            ]
            results = engine.step(rows).results
            for name, result in zip(counts, results, strict=True):
                assert result.error is None
                at[name] += counts[name]
                assert result.token_id == int(want[at[name] - 1].argmax())


def test_the_work_of_a_step_is_counted() -> None:
    model = random_model("llama")
    with cluster(model) as nodes:
        engine = nodes.engine()
        to = nodes.prefill(engine, TOKENS[:CONTEXT])
        nodes.open(engine, to, CONTEXT)
        outcome = feed(engine, CONTEXT, TOKENS[CONTEXT : CONTEXT + 2])
        (result,) = outcome.results
        # Scope [8, 192) of 3 layers x 2 KV heads for 2 rows.
        assert result.work.keys_in_scope == 184 * 3 * 2 * 2
        assert result.work.keys_attended == result.work.keys_covered == result.work.keys_in_scope
        assert result.work.bytes_in_scope == result.work.keys_in_scope * 2 * 16 * 4
        timing = outcome.timing
        parts = timing.send_s + timing.local_s + timing.wait_s + timing.merge_s + timing.sample_s
        assert 0 < parts < timing.total_s


def test_a_node_that_dies_is_replaced_by_its_replica_in_the_same_step() -> None:
    model = random_model("llama")
    want = eager_logits(model, TOKENS)
    with cluster(model) as nodes:
        engine = nodes.engine()
        to = nodes.prefill(engine, TOKENS[:CONTEXT], "replicated")
        nodes.open(engine, to, CONTEXT)
        assert_follows(engine, want, CONTEXT, [CONTEXT + 10])
        nodes.nodes["n0"].stop()
        assert_follows(engine, want, CONTEXT + 10, list(range(CONTEXT + 11, CONTEXT + 170)))


def test_without_a_replica_the_loss_is_told_and_the_session_stands_where_it_was() -> None:
    model = random_model("llama")
    with cluster(model) as nodes:
        engine = nodes.engine()
        to = nodes.prefill(engine, TOKENS[:CONTEXT])
        nodes.open(engine, to, CONTEXT)
        nodes.nodes["n1"].stop()
        for _ in range(2):
            result = feed(engine, CONTEXT, TOKENS[CONTEXT : CONTEXT + 5]).results[0]
            assert isinstance(result.error, CoverageTooLow)
            assert nodes.nodes["n1"].address in result.error.message
            assert result.coverage < 1


def test_a_session_that_allows_less_coverage_goes_on_and_says_how_much_it_had() -> None:
    model = random_model("llama")
    with cluster(model) as nodes:
        engine = nodes.engine()
        to = nodes.prefill(engine, TOKENS[:CONTEXT], "span_and_head")
        nodes.open(engine, to, CONTEXT, min_coverage=0.2)
        nodes.nodes["n1"].stop()
        result = feed(engine, CONTEXT, TOKENS[CONTEXT : CONTEXT + 5]).results[0]
        assert result.error is None
        assert result.token_id is not None
        # One head lacks [8, 128), the other [128, 192).
        assert result.coverage == pytest.approx(0.5)


def test_a_session_opens_on_the_replicas_that_are_left() -> None:
    model = random_model("llama")
    want = eager_logits(model, TOKENS)
    with cluster(model) as nodes:
        engine = nodes.engine()
        to = nodes.prefill(engine, TOKENS[:CONTEXT], "replicated")
        lost = nodes.prefill(engine, TOKENS[:CONTEXT], "layer")
        nodes.nodes["n0"].stop()
        nodes.open(engine, to, CONTEXT)
        assert_follows(engine, want, CONTEXT, [CONTEXT + 5])
        with pytest.raises(Unavailable, match="no node of shard 'layers-0'"):
            nodes.open(engine, lost, CONTEXT, "t")
        assert engine.status().sessions == 1
        # The node that did not answer may have it open all the same: only its id can close it.
        assert not engine.close_session("s", True)


def test_slots_run_out_and_come_back() -> None:
    model = random_model("llama")
    with cluster(model, max_sessions=2) as nodes:
        engine = nodes.engine()
        to = nodes.prefill(engine, TOKENS[:CONTEXT])
        nodes.open(engine, to, CONTEXT, "a")
        nodes.open(engine, to, CONTEXT, "b")
        nodes.open(engine, to, CONTEXT, "b")  # opening again takes no second slot
        with pytest.raises(ResourceExhausted, match="--max-sessions"):
            nodes.open(engine, to, CONTEXT, "c")
        assert engine.close_session("a", True)
        assert not engine.close_session("a", True)
        nodes.open(engine, to, CONTEXT, "c")
        assert engine.status().sessions == 2


def test_idle_sessions_give_their_slots_up_when_slots_run_out() -> None:
    model = random_model("llama")
    with cluster(model, max_sessions=2, session_timeout_s=0) as nodes:
        engine = nodes.engine()
        to = nodes.prefill(engine, TOKENS[:CONTEXT])
        for session_id in ("a", "b", "c"):
            nodes.open(engine, to, CONTEXT, session_id)
        result = feed(engine, CONTEXT, TOKENS[CONTEXT : CONTEXT + 1], "a").results[0]
        assert isinstance(result.error, NotFound)
        assert feed(engine, CONTEXT, TOKENS[CONTEXT : CONTEXT + 1], "c").results[0].error is None
        # Its nodes still hold it.
        assert nodes.open(engine, to, CONTEXT, "a", epoch=2)[0] == CONTEXT


def test_closing_a_session_closes_it_on_its_nodes_when_asked() -> None:
    model = random_model("llama")
    with cluster(model) as nodes:
        engine = nodes.engine()
        to = nodes.prefill(engine, TOKENS[:CONTEXT])
        for session_id, close_on_nodes in [("kept", False), ("closed", True)]:
            nodes.open(engine, to, CONTEXT, session_id)
            engine.close_session(session_id, close_on_nodes)
            held = [each.session_id for each in nodes.nodes["n0"].store.inventory("")[1]]
            assert held == ["kept"]


def test_progress_rises_and_ends_with_a_summary() -> None:
    model = random_model("llama")
    with cluster(model) as nodes:
        engine = nodes.engine()
        progress = list(
            engine.prefill(nodes.destination(CONTEXT), TOKENS[:CONTEXT], threading.Event())
        )
        fractions = [each.fraction for each in progress]
        assert fractions == sorted(fractions)
        summary = progress[-1].summary
        assert summary is not None
        assert progress[-1].fraction == 1.0
        assert set(summary.checksums) == {"layers-0", "layers-1"}
        assert summary.offloaded_bytes == 3 * 2 * 2 * CONTEXT * 16 * 4
        assert 0 < summary.compute_s <= summary.total_s


def test_a_cancelled_prefill_leaves_nothing_on_the_nodes_and_the_next_one_works() -> None:
    model = random_model("llama")
    with cluster(model) as nodes:
        engine = nodes.engine()
        cancelled = threading.Event()
        progress = engine.prefill(nodes.destination(CONTEXT), TOKENS[:CONTEXT], cancelled)
        next(progress)
        cancelled.set()
        with pytest.raises(Cancelled):
            list(progress)
        assert all(not node.store.inventory("")[0] for node in nodes.nodes.values())
        assert all(node.store.stats().context_bytes == 0 for node in nodes.nodes.values())
        nodes.prefill(engine, TOKENS[:CONTEXT])


def test_a_prefill_whose_reader_goes_away_is_dropped_too() -> None:
    model = random_model("llama")
    with cluster(model) as nodes:
        engine = nodes.engine()
        progress = engine.prefill(nodes.destination(CONTEXT), TOKENS[:CONTEXT], threading.Event())
        next(progress)
        progress.close()  # type: ignore[attr-defined]
        assert all(not node.store.inventory("")[0] for node in nodes.nodes.values())


def test_a_prefill_fails_clearly_when_a_node_is_gone() -> None:
    model = random_model("llama")
    with cluster(model) as nodes:
        engine = nodes.engine()
        nodes.nodes["n1"].stop()
        with pytest.raises(Unavailable, match=nodes.nodes["n1"].address):
            last_progress(
                engine.prefill(nodes.destination(CONTEXT), TOKENS[:CONTEXT], threading.Event())
            )
        assert not nodes.nodes["n0"].store.inventory("")[0]


def test_steps_run_while_a_prefill_does() -> None:
    model = random_model("llama")
    want = eager_logits(model, TOKENS)
    with cluster(model, prefill_chunk_tokens=128) as nodes:
        engine = nodes.engine()
        to = nodes.prefill(engine, TOKENS[:CONTEXT])
        nodes.open(engine, to, CONTEXT)
        long = random_tokens(4000, seed=8)
        done = threading.Event()

        def ingest() -> None:
            last_progress(engine.prefill(nodes.destination(4000), long, threading.Event()))
            done.set()

        thread = threading.Thread(target=ingest)
        thread.start()
        during = 0
        at = CONTEXT
        while not done.is_set() and at < CONTEXT + 150:
            assert_follows(engine, want, at, [at + 1])
            at += 1
            during += not done.is_set()
        thread.join()
        assert done.is_set()
        assert during >= 3


@pytest.mark.parametrize(
    ("tokens", "says"), [((), "0 tokens"), ((5,) * 4097, "4097"), ((1, 999), "999")]
)
def test_contexts_that_the_model_cannot_take_are_refused(
    tokens: tuple[int, ...], says: str
) -> None:
    model = random_model("llama")
    with cluster(model) as nodes:
        engine = nodes.engine()
        with pytest.raises(InvalidRequest, match=says):
            engine.prefill(nodes.destination(len(tokens)), tokens, threading.Event())


def test_kv_of_another_identity_is_refused() -> None:
    model = random_model("llama")
    with cluster(model) as nodes:
        engine = nodes.engine()
        to = nodes.destination(CONTEXT)
        other = Identity("llama", "another revision", "float32")
        with pytest.raises(IdentityMismatch, match="revision"):
            engine.prefill(replace(to, identity=other), TOKENS[:CONTEXT], threading.Event())


def test_a_capability_for_something_else_is_refused() -> None:
    model = random_model("llama")
    with cluster(model) as nodes:
        engine = nodes.engine()
        to, other = nodes.destination(CONTEXT), nodes.destination(CONTEXT)
        for capability in (b"", other.capability, to.capability[:-1] + b"x"):
            with pytest.raises(PermissionDenied):
                engine.prefill(
                    replace(to, capability=capability), TOKENS[:CONTEXT], threading.Event()
                )
        tenant = replace(to, identity=replace(to.identity, tenant="another"))
        with pytest.raises(PermissionDenied, match="another"):
            engine.prefill(tenant, TOKENS[:CONTEXT], threading.Event())


def test_an_older_epoch_does_not_close_a_newer_session() -> None:
    model = random_model("llama")
    with cluster(model) as nodes:
        engine = nodes.engine()
        to = nodes.prefill(engine, TOKENS[:CONTEXT])
        nodes.open(engine, to, CONTEXT, epoch=3)
        with pytest.raises(StaleEpoch):
            nodes.open(engine, to, CONTEXT, epoch=2)
        assert feed(engine, CONTEXT, TOKENS[CONTEXT : CONTEXT + 1]).results[0].error is None


def test_a_sparse_prefill_is_another_identity_and_serves_its_own_contexts() -> None:
    model = random_model("llama")
    with cluster(model, prefill_pattern="vertical_slash:verticals=5000,slashes=5000") as nodes:
        engine = nodes.engine()
        identity = engine.status().model.identity
        assert identity.prefill == "vertical_slash:verticals=5000,slashes=5000"
        with pytest.raises(IdentityMismatch, match="prefill 'dense'"):
            nodes.open(engine, nodes.destination(CONTEXT), CONTEXT)
        to = nodes.prefill(engine, TOKENS[:CONTEXT])
        nodes.open(engine, to, CONTEXT)
        # A budget of every column and diagonal is dense attention.
        assert_follows(engine, eager_logits(model, TOKENS), CONTEXT, [CONTEXT + 10])
