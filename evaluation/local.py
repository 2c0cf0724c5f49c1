"""Methods that run in this process: any decode method over contexts of any prefill method."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.answering import Answer, Answerer, Report
from gpu_worker.model import Model, load_model
from gpu_worker.patterns.per_head import MInference
from gpu_worker.patterns.spec import canonical, parse_pattern
from library.decode import DecodeMethod, parse_decode
from library.decode.full import Full
from library.prefilled import Prefilled
from library.question import PROMPT_RULES, PromptRule, Question
from longreach.errors import InvalidRequest

DENSE = "dense"


@dataclass(frozen=True, slots=True)
class LocalMethod:
    """A decode method, a prefill method as text, and how questions are met (library.question)."""

    decode: DecodeMethod
    prefill: str = DENSE
    prompt: PromptRule = "stored"

    def __str__(self) -> str:
        return f"{self.decode}@{self.prefill}, prompt={self.prompt}"


def parse_local(text: str) -> LocalMethod:
    """The method of DECODE[:PARAMETERS][@PREFILL[:PARAMETERS]].

    Among the decode parameters, prompt=stored or prompt=whole says how questions are met. Raises
    InvalidRequest naming what is wrong.
    """
    decode, _, prefill = text.partition("@")
    given = re.search(r"[:,]prompt=(\w*)", decode)
    prompt: PromptRule = "stored"
    if given:
        found = [rule for rule in PROMPT_RULES if rule == given[1]]
        if not found:
            raise InvalidRequest(f"prompt is {given[1]!r}; it must be {' or '.join(PROMPT_RULES)}")
        prompt = found[0]
        decode = decode[: given.start()] + re.sub(r"^,", given[0][0], decode[given.end() :])
    return LocalMethod(parse_decode(decode), _prefill(prefill or DENSE), prompt)


def _prefill(text: str) -> str:
    """With every parameter; `minference` alone names a file that only the model's directory has."""
    if text.strip() == MInference.name:
        return MInference.name
    pattern = parse_pattern(text)
    return text.strip() if isinstance(pattern, MInference) else canonical(pattern)


class Contexts:
    """Contexts of one prefill method, each prefilled once however many methods ask for it."""

    def __init__(self, model: Model, prefill: str = DENSE, *, every_query: bool = False) -> None:
        self.model = model
        self._prefill = prefill
        self._every_query = every_query
        self._held: dict[tuple[int, ...], tuple[Prefilled, int]] = {}

    def take(self, ids: tuple[int, ...], on_progress: Report) -> Prefilled:
        """The context of these tokens; to be given back by `release`."""
        if ids not in self._held:
            on_progress("prefill")
            made = Prefilled(self.model, ids, self._prefill, every_query=self._every_query)
            self._held[ids] = (made, 0)
        context, users = self._held[ids]
        self._held[ids] = (context, users + 1)
        return context

    def release(self, context: Prefilled) -> None:
        """One user less; the last one frees the context."""
        held, users = self._held[context.context]
        if users == 1:
            del self._held[context.context]
        else:
            self._held[context.context] = (held, users - 1)


@dataclass(frozen=True, slots=True)
class Taken:
    """A context, and how many positions a question and its answer may take."""

    context: Prefilled
    room_tokens: int


class LocalAnswerer(Answerer[Taken]):
    """One method over contexts that several answerers share."""

    def __init__(
        self, contexts: Contexts, decode: DecodeMethod, prompt: PromptRule = "stored"
    ) -> None:
        self._contexts = contexts
        self._decode = decode
        self._prompt = prompt

    def prefill(self, context_ids: Sequence[int], room_tokens: int, on_progress: Report) -> Taken:
        """Computes the context's KV in chunks, or finds it.

        Raises InvalidRequest when the model does not accept as many positions.
        """
        info = self._contexts.model.info
        positions = len(context_ids) + room_tokens
        if positions > info.max_positions:
            raise InvalidRequest(
                f"a sample takes {positions} positions; model {info.model!r} accepts "
                f"{info.max_positions}: ask for shorter lengths"
            )
        return Taken(self._contexts.take(tuple(context_ids), on_progress), room_tokens)

    def answer(self, handle: Taken, question_ids: Sequence[int], max_tokens: int) -> Answer:
        """Answers by the method. What it builds for a context is in the time of the first answer
        over it."""
        started = time.perf_counter()
        question = Question(handle.context, self._decode, handle.room_tokens, self._prompt)
        ids = question.answer(question_ids, max_tokens, self._contexts.model.info.eos_ids)
        return Answer(
            ids=tuple(ids),
            seconds=time.perf_counter() - started,
            work=question.work,
            resident_share=question.resident_share,
            index_kinds=tuple(sorted(question.kinds)),
            prefill_density=handle.context.density,
        )

    def release(self, handle: Taken) -> None:
        """Frees the context where nobody else uses it."""
        self._contexts.release(handle.context)


class FullAnswerer(LocalAnswerer):
    """Every key of every layer over dense contexts: what methods are compared with."""

    def __init__(self, contexts: Contexts) -> None:
        super().__init__(contexts, Full())

    @classmethod
    def load(cls, model: str) -> FullAnswerer:
        """Loads a directory or hub name."""
        return cls(Contexts(load_model(model)))

    def answer(self, handle: Taken, question_ids: Sequence[int], max_tokens: int) -> Answer:
        """Answers over every key; retrieval did no work."""
        found = super().answer(handle, question_ids, max_tokens)
        return Answer(found.ids, found.seconds)
