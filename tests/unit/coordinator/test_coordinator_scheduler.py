"""Continuous batching, against a worker that records its steps."""

from __future__ import annotations

import asyncio

import pytest
from coordinator_doubles import answer, next_token

from coordinator.generation import FinishReason, Generation
from coordinator.pacing import TOKENS_MIN, QuestionPace
from coordinator.scheduler import DecodeLoop
from longreach.errors import Aborted, Internal, NotFound, Unavailable
from longreach.steps import StepOutcome, StepRowResult, StepTiming
from longreach.types import WorkFigures


class RecordingWorker:
    """Answers with `next_token`; `gate` holds steps back."""

    def __init__(self):
        self.steps = []
        self.seen = {}
        self.errors = {}
        self.lost = None
        self.silent = set()
        self.gate = asyncio.Event()
        self.gate.set()
        self.busy = False
        self.token_s = 0.0

    async def step(self, rows, *, traceparent=""):
        assert not self.busy, "the next step was sent before the last one answered"
        self.busy = True
        try:
            self.steps.append([(r.session_id, len(r.token_ids), r.sample) for r in rows])
            await self.gate.wait()
            await asyncio.sleep(0)
            if self.lost:
                raise self.lost
            results = [self._row(row) for row in rows if row.session_id not in self.silent]
            total_s = self.token_s * sum(len(row.token_ids) for row in rows)
            timing = StepTiming(total_s=total_s, wait_s=0.5, node_s=0.25)
            return StepOutcome(tuple(results), timing)
        finally:
            self.busy = False

    def _row(self, row):
        if row.session_id in self.errors:
            return StepRowResult(row.session_id, error=self.errors[row.session_id])
        tokens = self.seen.setdefault(row.session_id, [])
        assert row.position == len(tokens)
        tokens.extend(row.token_ids)
        return StepRowResult(
            row.session_id,
            token_id=next_token(tokens) if row.sample else None,
            work=WorkFigures(keys_in_scope=len(row.token_ids)),
        )


def _generation(name, question, max_tokens=4, **fields):
    return Generation(name, position=0, question=tuple(question), max_tokens=max_tokens, **fields)


def _loop(worker, *, max_row_tokens=8, question_tokens=8, step_s=10.0, **fields):
    pace = QuestionPace(question_tokens, step_s)
    return DecodeLoop(worker, max_row_tokens=max_row_tokens, pace=pace, **fields)


async def _run(loop, generation):
    tokens = []
    await loop.run(generation, lambda token: tokens.append(token.token_id))
    return tokens


async def test_one_session_is_fed_its_question_and_then_token_by_token():
    worker = RecordingWorker()
    question = list(range(1, 21))
    tokens = await _run(_loop(worker), _generation("a", question))
    assert tokens == answer(question, 4)
    assert worker.steps == [
        [("a", 8, False)],
        [("a", 8, False)],
        [("a", 4, True)],
        [("a", 1, True)],
        [("a", 1, True)],
        [("a", 1, True)],
    ]


async def test_sessions_share_steps_and_answer_as_if_alone():
    worker = RecordingWorker()
    loop = _loop(worker, question_tokens=64)
    questions = {f"s{i}": list(range(1, 2 + 3 * i)) for i in range(6)}
    runs = [_run(loop, _generation(name, q, 5)) for name, q in questions.items()]
    answers = await asyncio.gather(*runs)
    assert answers == [answer(q, 5) for q in questions.values()]
    assert max(len(step) for step in worker.steps) == 6


async def test_a_session_joins_at_the_next_step_boundary():
    worker = RecordingWorker()
    loop = _loop(worker)
    worker.gate.clear()
    first = asyncio.create_task(_run(loop, _generation("a", [1], 3)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    second = asyncio.create_task(_run(loop, _generation("b", [2], 2)))
    await asyncio.sleep(0)
    worker.gate.set()
    assert await first == answer([1], 3)
    assert await second == answer([2], 2)
    assert [name for name, _, _ in worker.steps[0]] == ["a"]
    assert {name for name, _, _ in worker.steps[1]} == {"a", "b"}


async def test_a_long_question_does_not_keep_decoders_waiting():
    worker = RecordingWorker()
    loop = _loop(worker, max_row_tokens=512, question_tokens=16)
    decoding = asyncio.create_task(_run(loop, _generation("quick", [1], 10)))
    await asyncio.sleep(0)
    long = asyncio.create_task(_run(loop, _generation("long", [1] * 160, 1)))
    await asyncio.gather(decoding, long)
    shared = [{n: k for n, k, _ in step} for step in worker.steps if len(step) == 2]
    assert len(shared) >= 8
    assert all(step == {"quick": 1, "long": 16} for step in shared)


async def test_questions_take_turns():
    worker = RecordingWorker()
    loop = _loop(worker, question_tokens=8)
    runs = [_run(loop, _generation(name, [1] * 24, 1)) for name in ("a", "b")]
    await asyncio.gather(*runs)
    fed = [step[0][0] for step in worker.steps]
    assert fed == ["a", "b", "a", "b", "a", "b"]


async def test_a_failed_row_ends_only_its_session():
    worker = RecordingWorker()
    worker.errors["bad"] = NotFound("session bad")
    loop = _loop(worker)
    runs = [_run(loop, _generation(name, [3], 3)) for name in ("bad", "good")]
    bad, good = await asyncio.gather(*runs, return_exceptions=True)
    assert isinstance(bad, NotFound)
    assert good == answer([3], 3)


async def test_a_row_that_the_worker_forgot_is_an_error_not_a_hang():
    worker = RecordingWorker()
    worker.silent.add("a")
    with pytest.raises(Internal, match="no row"):
        await _run(_loop(worker), _generation("a", [3]))


async def test_a_lost_worker_ends_every_session_and_is_reported_once():
    worker = RecordingWorker()
    worker.lost = Unavailable("gone")
    reported = []
    loop = _loop(worker, on_lost=reported.append)
    runs = [_run(loop, _generation(name, [3])) for name in ("a", "b")]
    ends = await asyncio.gather(*runs, return_exceptions=True)
    assert [type(end) for end in ends] == [Unavailable, Unavailable]
    assert [(each.message, each.reason) for each in reported] == [("gone", "WORKER_LOST")]
    worker.lost = None
    assert await _run(loop, _generation("c", [3])) == answer([3], 4)


async def test_failing_the_loop_does_not_wait_for_the_step_in_flight():
    worker = RecordingWorker()
    worker.gate.clear()
    loop = _loop(worker)
    run = asyncio.create_task(_run(loop, _generation("a", [3])))
    await asyncio.sleep(0.01)
    loop.fail(Aborted("the worker died"))
    with pytest.raises(Aborted):
        await run


async def test_a_cancelled_session_leaves_after_the_step_in_flight():
    worker = RecordingWorker()
    loop = _loop(worker)
    worker.gate.clear()
    going = asyncio.create_task(_run(loop, _generation("going", [1], 100)))
    staying = asyncio.create_task(_run(loop, _generation("staying", [2], 5)))
    await asyncio.sleep(0.01)
    going.cancel()
    await asyncio.sleep(0.01)
    assert not going.done()
    worker.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await going
    assert await staying == answer([2], 5)
    assert sum("going" in [n for n, _, _ in step] for step in worker.steps) == 1


async def test_eos_ends_a_generation_and_counts_as_a_token():
    worker = RecordingWorker()
    stop_id = answer([1], 3)[2]
    generation = _generation("a", [1], 50, stop_ids=(stop_id,))
    assert await _run(_loop(worker), generation) == answer([1], 3)
    assert generation.finish_reason is FinishReason.STOP
    assert generation.tokens == 3


async def test_times_and_work_are_summed_and_the_question_is_counted_apart():
    worker = RecordingWorker()
    generation = _generation("a", range(1, 21), 4)
    await _run(_loop(worker), generation)
    figures = generation.figures
    assert figures.steps.wait_s == pytest.approx(6 * 0.5)
    assert figures.steps.node_s == pytest.approx(6 * 0.25)
    assert figures.prompt_work.keys_in_scope == 20
    assert figures.work.keys_in_scope == 3


def test_a_step_carries_as_many_question_tokens_as_fit_its_time():
    pace = QuestionPace(tokens_max=512, step_s=0.2)
    assert pace.tokens(decoders=3) == 512  # nothing is known yet
    pace.observe(question_tokens=0, step_s=0.05)
    pace.observe(question_tokens=3, step_s=0.06)  # too few to tell anything
    assert pace.tokens(decoders=3) == 512
    pace.observe(question_tokens=512, step_s=0.05 + 512 * 0.001)
    assert pace.tokens(decoders=3) == 200
    assert pace.tokens(decoders=0) == 512  # nobody waits


def test_the_pace_follows_the_steps_and_never_stops():
    pace = QuestionPace(tokens_max=512, step_s=0.2)
    for _ in range(50):
        pace.observe(question_tokens=16, step_s=16 * 0.5)
    assert pace.tokens(decoders=1) == TOKENS_MIN
    for _ in range(50):
        pace.observe(question_tokens=16, step_s=16 * 0.002)
    assert pace.tokens(decoders=1) == pytest.approx(100, abs=2)


async def test_slow_questions_are_cut_finer_while_others_decode():
    worker = RecordingWorker()
    worker.token_s = 0.01
    loop = _loop(worker, max_row_tokens=512, question_tokens=64, step_s=0.25)
    decoding = asyncio.create_task(_run(loop, _generation("quick", [1], 30)))
    await asyncio.sleep(0)
    await _run(loop, _generation("long", [1] * 256, 1))
    await decoding
    rows = [tokens for step in worker.steps for name, tokens, _ in step if name == "long"]
    assert rows[0] == 64 - 1  # the other one's question had a token in this step too
    assert set(rows[1:-1]) <= {24, 25}
