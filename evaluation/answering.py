"""Who answers: what every back-end offers, and a running cluster under a budget.

Methods in this process are in evaluation.local.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from longreach.errors import NotFound
from longreach.sdk import Client
from longreach.sdk.models import Context
from longreach.types import WorkFigures

Handle = TypeVar("Handle")
Report = Callable[[str], None]
"""Told what an answerer is doing, for a progress line."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Generated tokens without the one that ended them, and what they cost.

    work: of the question's rows and of the decode steps; None for full attention. A cluster counts
    the positions its nodes serve as in scope, methods in this process all earlier positions.
    resident_share: KV the worker held / KV of all positions. index_kinds: what answered.
    prefill_density: (row, key) pairs attended / visible in the context's prefill; None where it is
    not told.
    """

    ids: tuple[int, ...]
    seconds: float
    work: WorkFigures | None = None
    resident_share: float = 1.0
    index_kinds: tuple[str, ...] = ()
    prefill_density: float | None = None


class Answerer(ABC, Generic[Handle]):
    """Prefills a context once, then answers any number of questions over it, greedily."""

    @abstractmethod
    def prefill(self, context_ids: Sequence[int], room_tokens: int, on_progress: Report) -> Handle:
        """Takes a context in. `room_tokens` bounds every later question with its answer."""

    @abstractmethod
    def answer(self, handle: Handle, question_ids: Sequence[int], max_tokens: int) -> Answer:
        """Answers one question; questions do not see each other."""

    @abstractmethod
    def release(self, handle: Handle) -> None:
        """Frees what `prefill` took."""


class ClusterAnswerer(Answerer[Context]):
    """A running cluster, through its public API, under one budget.

    The cluster's nodes decide the index kind. Several answerers of one cluster share a context: it
    is stored once and found by the others. A context that was there before is left there.
    """

    def __init__(self, client: Client, budget: str, model: str = "") -> None:
        self._client = client
        self._budget = budget
        self._model = model

    def prefill(self, context_ids: Sequence[int], room_tokens: int, on_progress: Report) -> Context:
        """Stores the context and waits until its index is built, so that the index answers."""
        created = self._client.contexts.create(
            tokens=context_ids,
            model=self._model,
            on_progress=lambda context: on_progress(f"prefill {context.prefill_fraction:.0%}"),
        )
        self._client.contexts.wait_indexed(
            created, on_progress=lambda context: on_progress(f"index {context.index_fraction:.0%}")
        )
        return created

    def answer(self, handle: Context, question_ids: Sequence[int], max_tokens: int) -> Answer:
        """Answers under the budget."""
        started = time.perf_counter()
        generation = self._client.generate(
            list(question_ids), context=handle, max_tokens=max_tokens, budget=self._budget
        )
        ids = tuple(token.id for token in generation.tokens)
        # No stop texts are sent, so a stop is the model's end of sequence, which comes as a token.
        ended = generation.finish_reason == "stop"
        return Answer(
            ids=ids[:-1] if ended else ids,
            seconds=time.perf_counter() - started,
            work=generation.work + generation.prompt_work,
            resident_share=generation.resident_kv_bytes / max(1, generation.full_kv_bytes),
            index_kinds=generation.index_kinds,
        )

    def release(self, handle: Context) -> None:
        """Deletes the context if this answerer stored it."""
        if not handle.found:
            with suppress(NotFound):
                self._client.contexts.delete(handle)


AnyAnswerer = Answerer[Any]
