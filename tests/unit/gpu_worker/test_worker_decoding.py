"""Decode steps of every family equal eager attention; a failed row costs nobody else anything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from worker_doubles import LocalWorker, bits_equal
from worker_models import FAMILIES, assert_logits_equal, eager_logits, random_model, random_tokens

from gpu_worker.methods.base import Collected, Ticket
from longreach.errors import (
    CoverageTooLow,
    FailedPrecondition,
    Internal,
    InvalidRequest,
    LongreachError,
    NotFound,
    StaleEpoch,
    Unavailable,
)
from longreach.steps import StepRow
from longreach.types import SamplingParams, StorageArray

CONTEXT = 150


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_question_and_64_decode_steps_equal_eager_attention(family: str) -> None:
    model = random_model(family)
    tokens = random_tokens(CONTEXT + 20 + 64)
    want = eager_logits(model, tokens)
    worker = LocalWorker(model)
    assert_logits_equal(worker.prefill("s", tokens[:CONTEXT]), want[CONTEXT - 1])
    worker.open("s", CONTEXT)
    for start, stop in [(CONTEXT, CONTEXT + 20), *((i, i + 1) for i in range(170, 234))]:
        outcome = worker.feed("s", tokens[start:stop])
        assert outcome.results[0].error is None
        assert outcome.results[0].token_id == int(want[stop - 1].argmax())
        assert_logits_equal(worker.last_logits["s"], want[stop - 1])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_sessions_of_different_lengths_share_steps(family: str) -> None:
    model = random_model(family)
    worker = LocalWorker(model)
    lengths = {"a": 150, "b": 31, "c": 97}
    tokens = {name: random_tokens(n + 80, seed=n) for name, n in lengths.items()}
    want = {name: eager_logits(model, each) for name, each in tokens.items()}
    for name, length in lengths.items():
        worker.prefill(name, tokens[name][:length])
        worker.open(name, length)
    feeds = [{"a": 7, "b": 1, "c": 7}, *[{"a": 1, "b": 1, "c": 1}] * 40, {"a": 1, "b": 24, "c": 3}]
    at = dict(lengths)
    for counts in feeds:
        rows = [worker.row(n, tokens[n][at[n] : at[n] + count]) for n, count in counts.items()]
        outcome = worker.step(rows)
        assert [result.error for result in outcome.results] == [None] * 3
        assert [result.session_id for result in outcome.results] == list(counts)
        for name, count in counts.items():
            at[name] += count
            assert_logits_equal(worker.last_logits[name], want[name][at[name] - 1])


def test_a_session_without_a_context_starts_at_position_zero() -> None:
    model = random_model("qwen3")
    tokens = random_tokens(120)
    want = eager_logits(model, tokens)
    worker = LocalWorker(model)
    empty = torch.zeros(model.layers[0].kv_heads, 0, model.layers[0].head_dim).numpy()
    for layer in range(len(model.layers)):
        worker.retriever.append("s", layer, empty, empty)
    worker.open("s", 0)
    for start in range(0, 120, 12):
        worker.feed("s", tokens[start : start + 12])
        assert_logits_equal(worker.last_logits["s"], want[start + 11])


def test_a_session_on_a_prefix_of_a_stored_context_sees_only_the_prefix() -> None:
    model = random_model("llama")
    tokens = random_tokens(150)
    other = random_tokens(30, seed=9)
    want = eager_logits(model, tokens[:100] + other)
    worker = LocalWorker(model)
    worker.prefill("s", tokens[:100])
    worker.open("s", 100)
    for start in range(30):
        worker.feed("s", other[start : start + 1])
    assert_logits_equal(worker.last_logits["s"], want[-1])


def opened(family: str = "llama") -> tuple[LocalWorker, tuple[int, ...]]:
    worker = LocalWorker(random_model(family))
    tokens = random_tokens(300)
    worker.prefill("s", tokens[:CONTEXT])
    worker.open("s", CONTEXT)
    return worker, tokens


@pytest.mark.parametrize(
    ("row", "error", "says"),
    [
        (StepRow("nobody", 0, (5,), True), NotFound, "nobody"),
        (StepRow("s", 149, (5,), True), FailedPrecondition, "stands at 150"),
        (StepRow("s", 150, (), True), InvalidRequest, "0 tokens"),
        (StepRow("s", 150, (5,) * 25, True), InvalidRequest, "1 to 24"),
        (StepRow("s", 150, (5, 512), True), InvalidRequest, "512"),
        (StepRow("s", 150, (5,), True, 1000), InvalidRequest, "1000"),
    ],
)
def test_a_bad_row_is_refused_by_name_and_the_next_one_works(
    row: StepRow, error: type[LongreachError], says: str
) -> None:
    worker, tokens = opened()
    (result,) = worker.step([row]).results
    assert type(result.error) is error
    assert says in result.error.message
    assert worker.feed("s", tokens[150:151]).results[0].error is None


def test_two_rows_of_one_session_in_a_step_are_refused() -> None:
    worker, tokens = opened()
    first, second = worker.step([worker.row("s", tokens[150:151])] * 2).results
    assert first.error is None
    assert isinstance(second.error, InvalidRequest)


def test_positions_beyond_the_models_limit_are_refused() -> None:
    model = random_model("llama", max_position_embeddings=160)
    worker = LocalWorker(model)
    tokens = random_tokens(200)
    worker.prefill("s", tokens[:150])
    worker.open("s", 150)
    result = worker.feed("s", tokens[150:162]).results[0]
    assert isinstance(result.error, InvalidRequest)
    assert result.error.reason == "TOO_LONG"


def test_a_failed_question_leaves_the_session_where_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker, tokens = opened()
    want = eager_logits(worker.model, tokens[:200])
    forward = worker.model.module.model.layers[2].forward
    with monkeypatch.context() as patch:

        def fail(*args: object, **kwargs: object) -> None:
            raise RuntimeError("device lost")

        patch.setattr(worker.model.module.model.layers[2], "forward", fail)
        result = worker.feed("s", random_tokens(24, seed=5)).results[0]
    assert isinstance(result.error, Internal)
    assert worker.model.module.model.layers[2].forward == forward
    for start in range(150, 200):
        worker.feed("s", tokens[start : start + 1])
        assert_logits_equal(worker.last_logits["s"], want[start])


def test_a_step_that_fails_on_the_device_leaves_no_reply_untaken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker, tokens = opened()
    want = eager_logits(worker.model, tokens[:160])
    sent, taken = [], []
    send = worker.retriever.send

    class Counted:
        def __init__(self, ticket: Ticket) -> None:
            self.ticket = ticket

        def collect(self) -> Collected:
            taken.append(self.ticket)
            return self.ticket.collect()

    def counting(*args: Any) -> Counted:
        sent.append(args)
        return Counted(send(*args))

    def out_of_memory(*args: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(worker.retriever, "send", counting)
    with monkeypatch.context() as patch:
        patch.setattr("gpu_worker.step.dense_attention", out_of_memory)
        result = worker.feed("s", tokens[150:160]).results[0]
    assert isinstance(result.error, Internal)
    assert len(sent) == len(taken) == 1
    worker.feed("s", tokens[150:160])
    assert_logits_equal(worker.last_logits["s"], want[159])
    assert len(sent) == len(taken) == 4


def test_a_node_that_fails_one_session_fails_only_that_row(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, tokens = opened()
    worker.prefill("t", tokens[:140])
    worker.open("t", 140)
    want = eager_logits(worker.model, tokens)
    attend = worker.retriever._attend

    def half(layer: int, asked: object, *rest: object) -> object:
        answer = attend(layer, asked, *rest)  # type: ignore[arg-type]
        if asked.session_id == "s":  # type: ignore[attr-defined]
            answer.parts.clear()
            answer.work = type(answer.work)(keys_in_scope=answer.work.keys_in_scope)
            answer.error = Unavailable("node-0 does not answer")
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(worker.retriever, "_attend", half)
        rows = [worker.row("s", tokens[150:151]), worker.row("t", tokens[140:141])]
        first, second = worker.step(rows).results
    assert isinstance(first.error, CoverageTooLow)
    assert first.coverage == 0.0
    assert second.error is None
    assert_logits_equal(worker.last_logits["t"], want[140])
    assert worker.decoder.sessions["s"].length == 150
    worker.feed("s", tokens[150:151])
    assert_logits_equal(worker.last_logits["s"], want[150])


def test_what_the_batch_holds_does_not_change_a_sampled_token() -> None:
    model = random_model("llama")
    sampling = SamplingParams(temperature=1.5, top_p=0.95, seed=11)
    tokens = random_tokens(CONTEXT)
    drawn = []
    for others in (0, 2):
        worker = LocalWorker(model)
        for name in ["s", *(f"other-{i}" for i in range(others))]:
            worker.prefill(name, tokens)
            worker.open(name, CONTEXT, sampling if name == "s" else None)
        outputs, token = [], 7
        for _ in range(12):
            names = ["s", *(f"other-{i}" for i in range(others))]
            results = worker.step([worker.row(name, (token,)) for name in names]).results
            assert results[0].token_id is not None
            token = results[0].token_id
            outputs.append(token)
        drawn.append(outputs)
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 1


def test_log_probabilities_are_those_of_the_model() -> None:
    worker, tokens = opened()
    want = torch.log_softmax(eager_logits(worker.model, tokens[:151])[-1], -1)
    row = StepRow("s", 150, tokens[150:151], True, 3)
    result = worker.step([row]).results[0]
    best = torch.topk(want, 3)
    assert [token for token, _ in result.top_logprobs] == best.indices.tolist()
    assert [lp for _, lp in result.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert result.logprob == pytest.approx(float(best.values[0]), abs=1e-4)


def test_a_row_whose_logits_are_not_finite_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, tokens = opened()
    worker.prefill("t", tokens[:140])
    worker.open("t", 140)
    forward = worker.model.forward

    def overflow(model: object, **arguments: object) -> torch.Tensor:
        logits = forward(**arguments).clone()
        logits[0, 7] = torch.nan
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(type(worker.model), "forward", overflow)
        rows = [worker.row("s", tokens[150:151]), worker.row("t", tokens[140:141])]
        first, second = worker.step(rows).results
    assert isinstance(first.error, Internal)
    assert "NaN" in first.error.message
    assert second.error is None
    assert worker.feed("s", tokens[150:151]).results[0].error is None


def test_sessions_in_scattered_slots_share_steps() -> None:
    model = random_model("gemma2")
    tokens = random_tokens(120)
    want = eager_logits(model, tokens)
    worker = LocalWorker(model, slots=6)
    for name in "abcdef":
        worker.prefill(name, tokens[:100])
        worker.open(name, 100)
    for name in "be":
        worker.slab.release(worker.decoder.sessions.pop(name).slot)
    for counts in ([1, 1, 1, 1], [5, 5, 2, 1], [1, 3, 1, 1]):
        rows = []
        for name, count in zip("acdf", counts, strict=True):
            at = worker.decoder.sessions[name].length
            rows.append(worker.row(name, tokens[at : at + count]))
        assert not any(result.error for result in worker.step(rows).results)
        for name in "acdf":
            at = worker.decoder.sessions[name].length
            assert_logits_equal(worker.last_logits[name], want[at - 1])


def test_a_row_that_does_not_sample_returns_no_token_but_moves_the_session() -> None:
    worker, tokens = opened()
    result = worker.feed("s", tokens[150:160], sample=False).results[0]
    assert result.token_id is None
    assert worker.decoder.sessions["s"].length == 160


def test_a_step_waits_for_tokens_that_leave_the_window_and_then_fails_clearly() -> None:
    worker, tokens = opened()
    worker.feed("s", tokens[150:151])
    assert worker.stream is not None
    worker.stream.silent = True
    refused = None
    for at in range(151, 300):
        refused = worker.feed("s", tokens[at : at + 1]).results[0]
        if refused.error is not None:
            break
    assert refused is not None
    assert isinstance(refused.error, Unavailable)
    assert refused.error.reason == "TAIL_NOT_STORED"
    # Never more than the window (40 tokens and up to 63 of the boundary's grain) unacknowledged.
    assert at - refused.acknowledged_stop <= 40 + 63 + 1


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_a_node_refused_for_a_while_is_sent_again_from_the_window(family: str) -> None:
    worker, tokens = opened(family)
    want = eager_logits(worker.model, tokens)
    worker.feed("s", tokens[150:151])
    assert worker.stream is not None
    worker.stream.error = Unavailable("node-0 restarts")
    at = 151
    while worker.feed("s", tokens[at : at + 1]).results[0].error is None:
        at += 1
    worker.stream.error = None
    refused = at
    for at in range(refused, 290):
        result = worker.feed("s", tokens[at : at + 1]).results[0]
        assert result.error is None
        assert_logits_equal(worker.last_logits["s"], want[at])
    assert result.acknowledged_stop == 290
    for layer in range(len(worker.model.layers)):
        for sent, want_kv in zip(
            worker.retriever.stored("s", layer), prefilled(worker, tokens[:290], layer), strict=True
        ):
            np.testing.assert_allclose(
                np.asarray(sent, np.float32), np.asarray(want_kv, np.float32), atol=2e-5
            )


def prefilled(
    worker: LocalWorker, tokens: tuple[int, ...], layer: int
) -> tuple[StorageArray, StorageArray]:
    """Keys and values of a layer as one prefill makes them."""
    if ("whole", layer) not in worker.retriever._stored:
        worker.prefill("whole", tokens)
    return worker.retriever.stored("whole", layer)


def test_a_session_that_another_writer_took_over_is_fenced_off() -> None:
    worker, tokens = opened()
    worker.feed("s", tokens[150:151])
    assert worker.stream is not None
    worker.stream.error = StaleEpoch("epoch 1 is older than 2")
    worker.feed("s", tokens[151:152])
    worker.stream.error = None
    for _ in range(2):
        result = worker.step([worker.row("s", tokens[152:153])]).results[0]
        assert isinstance(result.error, StaleEpoch)


@pytest.mark.parametrize("between", [0, 5])
def test_steps_between_prefill_chunks_change_no_bit(between: int) -> None:
    model = random_model("llama")
    tokens, big = random_tokens(300), random_tokens(900, seed=3)

    def decode(worker: LocalWorker) -> list[torch.Tensor]:
        at = worker.decoder.sessions["s"].length
        worker.feed("s", tokens[at : at + 1])
        return [worker.last_logits["s"]]

    alone = LocalWorker(model)
    alone.prefill("s", tokens[:CONTEXT])
    alone.open("s", CONTEXT)
    want_prefill = alone.prefill("big", big)
    shared = LocalWorker(model)
    shared.prefill("s", tokens[:CONTEXT])
    shared.open("s", CONTEXT)
    got: list[torch.Tensor] = []

    def point(layer: int, tokens_done: int) -> bool:
        if tokens_done:
            got.extend(decode(shared))
        return True

    got_prefill = shared.prefill("big", big, point=point)
    want = [logits for _ in got for logits in decode(alone)]
    assert len(got) >= 12
    assert bits_equal(got_prefill, want_prefill)
    assert all(bits_equal(a, b) for a, b in zip(got, want, strict=True))
