"""Who answers: full attention in this process, or a running cluster under a budget."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from gpu_worker.model import Model, load_model
from gpu_worker.reference import FullAttention
from longreach.errors import InvalidRequest, NotFound
from longreach.sdk import Client
from longreach.sdk.models import Context
from longreach.types import WorkFigures

Handle = TypeVar("Handle")
Report = Callable[[str], None]
"""Told what an answerer is doing, for a progress line."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Generated tokens without the one that ended them, and what they cost.

    work: retrieval of the question's rows and of the decode steps; None without retrieval.
    resident_share: KV the worker held / KV of all positions. index_kinds: what answered.
    """

    ids: tuple[int, ...]
    seconds: float
    work: WorkFigures | None = None
    resident_share: float = 1.0
    index_kinds: tuple[str, ...] = ()


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


class FullAnswerer(Answerer[FullAttention]):
    """Every key of every layer, in this process: what methods are compared with."""

    def __init__(self, model: Model) -> None:
        self._model = model

    @classmethod
    def load(cls, model: str) -> FullAnswerer:
        """Loads a directory or hub name."""
        return cls(load_model(model))

    def prefill(
        self, context_ids: Sequence[int], room_tokens: int, on_progress: Report
    ) -> FullAttention:
        """Computes the context's KV in chunks.

        Raises InvalidRequest when the model does not accept as many positions.
        """
        positions = len(context_ids) + room_tokens
        if positions > self._model.info.max_positions:
            raise InvalidRequest(
                f"a sample takes {positions} positions; model {self._model.info.model!r} accepts "
                f"{self._model.info.max_positions}: ask for shorter lengths"
            )
        on_progress("prefill")
        return FullAttention(self._model, context_ids, room_tokens)

    def answer(self, handle: FullAttention, question_ids: Sequence[int], max_tokens: int) -> Answer:
        """Answers over every key."""
        started = time.perf_counter()
        ids = handle.answer(question_ids, max_tokens, self._model.info.eos_ids)
        return Answer(tuple(ids), time.perf_counter() - started)

    def release(self, handle: FullAttention) -> None:
        """Frees the KV."""
        handle.keys.clear()
        handle.values.clear()


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
