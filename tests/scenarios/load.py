"""Steady load: concurrent greedy generations over several contexts, each answer checked.

References are taken from the same cluster before any fault, with the two likeliest tokens of each
position, so that near ties are known (`verdict.py`).
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from longreach.errors import LongreachError
from longreach.sdk import Client
from tests.scenarios.verdict import Reference, Verdict, first_difference, judge

CONTEXT_TOKENS = (1200, 2000, 2900)
# Some longer than the window of 64: generated tokens move to the nodes while others follow.
ANSWER_TOKENS = (16, 32, 80)
REQUEST_TIMEOUT_S = 30.0
_PROMPT_TOKENS = 12
_BYTES = 256
_POLL_S = 0.02


@dataclass(frozen=True)
class Question:
    """A prompt over a context, with its fault-free answer."""

    context_id: str
    prompt: tuple[int, ...]
    reference: Reference


@dataclass(frozen=True)
class Outcome:
    """What became of one request. Times are time.monotonic seconds."""

    question: Question
    stream: str
    began: float
    ended: float
    verdict: Verdict
    tokens: tuple[int, ...] = ()
    error: LongreachError | None = None

    def __str__(self) -> str:
        told = (
            f"{self.verdict.value} after {len(self.tokens)} tokens, {self.ended - self.began:.2f} s"
        )
        if self.error is not None:
            return f"{told}: {type(self.error).__name__} {self.error.reason}: {self.error.message}"
        at = first_difference(self.tokens, self.question.reference.tokens)
        if at is None:
            return told
        return f"{told}: first difference at {at}, margin {self.question.reference.margins[at]:.4f}"


@dataclass
class Library:
    """The stored contexts and the questions over them."""

    contexts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    questions: list[Question] = field(default_factory=list)

    def store(self, client: Client, seed: int = 0) -> None:
        """Stores the contexts and takes the references. No fault may be under way."""
        numbers = random.Random(seed)
        for length in CONTEXT_TOKENS:
            tokens = tuple(numbers.choices(range(_BYTES), k=length))
            context = client.contexts.create(tokens=tokens, timeout_s=REQUEST_TIMEOUT_S)
            self.contexts[context.id] = tokens
        # The same prompts over every context: answers differ by what the contexts say alone.
        for length in ANSWER_TOKENS:
            prompt = tuple(numbers.choices(range(_BYTES), k=_PROMPT_TOKENS))
            for context_id in self.contexts:
                reference = _reference(client, context_id, prompt, length)
                self.questions.append(Question(context_id, prompt, reference))
        self._check_distinct()

    def others(self, question: Question) -> list[Reference]:
        """The answers of other contexts."""
        return [q.reference for q in self.questions if q.context_id != question.context_id]

    def _check_distinct(self) -> None:
        """An answer that came from another context must be told apart from the right one."""
        for question in self.questions:
            for other in self.others(question):
                verdict = judge(other.tokens, question.reference, [other])
                assert verdict is Verdict.FOREIGN, "two contexts give the same answer"


def _reference(client: Client, context_id: str, prompt: Sequence[int], tokens: int) -> Reference:
    generation = client.generate(
        prompt, context=context_id, max_tokens=tokens, budget="exact", ignore_eos=True, logprobs=2,
        timeout_s=REQUEST_TIMEOUT_S,
    )  # fmt: skip
    assert generation.coverage == 1.0
    best = [sorted((p for _, p in token.alternatives), reverse=True) for token in generation.tokens]
    return Reference(tuple(token.id for token in generation.tokens), tuple(a - b for a, b in best))


class SteadyLoad:
    """Streams that ask one question after another until stopped. A context manager."""

    def __init__(
        self, client: Client, library: Library, *, streams: int = 4, seed: int = 0
    ) -> None:
        self._client = client
        self._library = library
        self._stopping = threading.Event()
        self._stamps: dict[str, list[float]] = {f"stream-{n}": [] for n in range(streams)}
        # When the question was asked that a stream last got a token for.
        self._answered = dict.fromkeys(self._stamps, 0.0)
        self._outcomes: list[Outcome] = []
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(name, random.Random(f"{seed} {name}")))
            for name in self._stamps
        ]
        for thread in self._threads:
            thread.daemon = True

    def __enter__(self) -> SteadyLoad:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.abandon() if kind else self.stop()

    def abandon(self) -> None:
        """Begins no more requests and waits for none; harmless after `stop`."""
        self._stopping.set()

    def stop(self) -> None:
        """Lets the requests under way finish; none begins after it."""
        self.abandon()
        for thread in self._threads:
            thread.join(2 * REQUEST_TIMEOUT_S)
            assert not thread.is_alive(), "a request ignores its deadline"

    def outcomes(self, since: float = 0.0) -> list[Outcome]:
        """Requests finished at or after a time."""
        with self._lock:
            return [outcome for outcome in self._outcomes if outcome.ended >= since]

    def counts(self) -> Counter[Verdict]:
        """How many requests of each verdict."""
        return Counter(outcome.verdict for outcome in self.outcomes())

    def stamps(self) -> dict[str, tuple[float, ...]]:
        """When each stream got tokens."""
        return {name: tuple(stamps) for name, stamps in self._stamps.items()}

    def wait_progress(self, since: float, timeout_s: float) -> bool:
        """Waits until every stream has got a token after a time; False if not in time."""
        return _in_time(lambda: not self.silent(since), timeout_s)

    def silent(self, since: float) -> list[str]:
        """Streams that have got no token after a time."""
        return [name for name, at in self._stamps.items() if not at or at[-1] <= since]

    def wait_anew(self, since: float, timeout_s: float) -> bool:
        """Waits until every stream answers a question that it asked after a time."""
        return _in_time(lambda: not self.unanswered(since), timeout_s)

    def unanswered(self, since: float) -> list[str]:
        """Streams that have got no token for a question that they asked after a time."""
        return [name for name, began in self._answered.items() if began <= since]

    def _run(self, name: str, numbers: random.Random) -> None:
        while not self._stopping.is_set():
            outcome = self._ask(name, numbers.choice(self._library.questions))
            with self._lock:
                self._outcomes.append(outcome)
            if outcome.error is not None:
                # As a patient caller does: at once, a refused stream would only fill the list.
                self._stopping.wait(0.2)

    def _ask(self, name: str, question: Question) -> Outcome:
        began = time.monotonic()
        tokens: list[int] = []
        try:
            with self._client.stream(
                question.prompt, context=question.context_id, budget="exact", ignore_eos=True,
                max_tokens=len(question.reference.tokens), timeout_s=REQUEST_TIMEOUT_S,
            ) as stream:  # fmt: skip
                for token in stream:
                    tokens.append(token.id)
                    self._stamps[name].append(time.monotonic())
                    self._answered[name] = began
                whole = stream.summary.coverage == 1.0
        except LongreachError as error:
            return self._outcome(question, name, began, Verdict.FAILED, tokens, error)
        verdict = judge(tokens, question.reference, self._library.others(question))
        if not whole:  # Nobody allowed less.
            verdict = Verdict.WRONG
        return self._outcome(question, name, began, verdict, tokens)

    @staticmethod
    def _outcome(
        question: Question,
        name: str,
        began: float,
        verdict: Verdict,
        tokens: Sequence[int],
        error: LongreachError | None = None,
    ) -> Outcome:
        return Outcome(question, name, began, time.monotonic(), verdict, tuple(tokens), error)


def _in_time(holds: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
