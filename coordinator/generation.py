"""One generation as a state machine: rows out, results in, tokens and a summary for the client.

No I/O and no clock of its own; the decode loop drives it. A generation first feeds its question in
rows of several tokens, sampling after the last, then one token per step.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from coordinator.stop_texts import StopTexts
from coordinator.tokenizer import Detokenizer
from longreach.errors import Internal
from longreach.steps import StepRow, StepRowResult, StepTiming
from longreach.types import BOUNDARY_TOKENS, WorkFigures


class FinishReason(enum.Enum):
    """Why a generation ended (the values are those of the public protocol)."""

    STOP = 1
    LENGTH = 2


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token; `alternatives` are (token id, log-probability)."""

    token_id: int
    text: str
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Figures:
    """What a generation cost: worker and node times in seconds, work on the nodes."""

    first_token_at: float = 0.0
    last_token_at: float = 0.0
    steps: StepTiming = field(default_factory=StepTiming)
    work: WorkFigures = field(default_factory=WorkFigures)
    prompt_work: WorkFigures = field(default_factory=WorkFigures)
    coverage: float = 1.0
    hedged_requests: int = 0

    def add_step(self, timing: StepTiming) -> None:
        """Counts a step in which the generation had a row."""
        self.steps = StepTiming(
            *(
                getattr(self.steps, name) + getattr(timing, name)
                for name in StepTiming.__dataclass_fields__
            )
        )


class Generation:
    """The tokens of one session.

    `position` is where the next row starts. `detokenizer` is None when no text is wanted or no
    tokenizer is at hand; tokens then carry empty texts and stop texts cannot be given. `generated`
    are tokens that the client has from an earlier attempt.
    """

    def __init__(
        self,
        session_id: str,
        *,
        position: int,
        question: tuple[int, ...],
        max_tokens: int,
        stop_ids: tuple[int, ...] = (),
        stop_texts: tuple[str, ...] = (),
        top_logprobs: int = 0,
        detokenizer: Detokenizer | None = None,
        generated: tuple[int, ...] = (),
    ) -> None:
        self.session_id = session_id
        self.position = position
        self.recomputed_tokens = 0
        self.lagging_node_ids: tuple[str, ...] = ()
        self.figures = Figures()
        self.finish_reason: FinishReason | None = None
        self.tokens = 0
        self._start = position
        self._question_stop = position + len(question)
        self._ids = [*question, *generated]
        self._pending = tuple(self._ids)
        self._window = 0
        self._decoding = False
        self._max_tokens = max_tokens
        self._stop_ids = frozenset(stop_ids)
        self._top_logprobs = top_logprobs
        self._detokenizer = detokenizer
        self._stop = StopTexts(stop_texts)
        if generated:  # All but the last token was fed once, in an earlier attempt.
            self.position = position + len(self._ids) - 1
        for token_id in generated:
            self.tokens += 1
            self._read(token_id)

    @property
    def generated_ids(self) -> tuple[int, ...]:
        """Tokens generated so far."""
        return tuple(self._ids[self._question_stop - self._start :])

    def stand_at(self, stop: int, window: int = 0) -> None:
        """Goes on at position `stop`, up to which the session's nodes hold its KV: what was fed
        beyond it is fed again. `window` is the worker's window in tokens."""
        last = self._start + len(self._ids) - 1
        if not self._start <= stop <= last:
            raise Internal(
                f"session {self.session_id} was opened at position {stop}; its tokens are at "
                f"[{self._start}, {last + 1}) and the last one is yet to be fed"
            )
        self.recomputed_tokens += max(0, self.position - stop)
        self.position = stop
        self._pending = tuple(self._ids[stop - self._start :])
        self._window = window
        self._decoding = self.tokens > 0 and len(self._pending) == 1

    @property
    def decoding(self) -> bool:
        """Whether the question is fed and each row is one generated token."""
        return self._decoding

    def next_row(self, tokens_max: int) -> StepRow:
        """The row for the next step, of at most `tokens_max` tokens."""
        token_ids = self._pending[: min(tokens_max, self._alike())]
        return StepRow(
            session_id=self.session_id,
            position=self.position,
            token_ids=token_ids,
            sample=len(token_ids) == len(self._pending),
            top_logprobs=self._top_logprobs,
        )

    def _alike(self) -> int:
        """How many of the next tokens may share a row and still be attended as when they were fed
        one by one: the nodes' part of the context is the same for all tokens of a row."""
        if self.position < self._question_stop:
            return self._question_stop - self.position
        return BOUNDARY_TOKENS - (self.position - self._window) % BOUNDARY_TOKENS

    def accept(
        self, row: StepRow, result: StepRowResult, timing: StepTiming, now: float
    ) -> Token | None:
        """Takes the result of a row; returns the token it produced, if it sampled.

        Raises the row's error; the generation then stands where it was.
        """
        if result.error is not None:
            raise result.error
        self._account(result, timing)
        self.position += len(row.token_ids)
        self._pending = self._pending[len(row.token_ids) :]
        if not row.sample or result.token_id is None:
            return None
        self._decoding = True
        self._pending = (result.token_id,)
        self._ids.append(result.token_id)
        self.tokens += 1
        self.figures.first_token_at = self.figures.first_token_at or now
        self.figures.last_token_at = now
        text = self._read(result.token_id)
        return Token(result.token_id, text, result.logprob, result.top_logprobs)

    def _account(self, result: StepRowResult, timing: StepTiming) -> None:
        figures = self.figures
        figures.add_step(timing)
        figures.coverage = min(figures.coverage, result.coverage)
        figures.hedged_requests += result.hedged_requests
        self.lagging_node_ids = result.lagging_node_ids
        if self._decoding:
            figures.work += result.work
        else:
            figures.prompt_work += result.work

    def _read(self, token_id: int) -> str:
        """Decides whether the token is the last one and returns the text to emit with it."""
        text = ""
        if self._detokenizer is not None and token_id not in self._stop_ids:
            text = self._stop.push(self._detokenizer.push(token_id))
        if self._stop.found is not None or token_id in self._stop_ids:
            self.finish_reason = FinishReason.STOP
        elif self.tokens >= self._max_tokens:
            self.finish_reason = FinishReason.LENGTH
        if self.finish_reason is None or self._stop.found is not None:
            return text
        if self._detokenizer is not None:
            text += self._stop.push(self._detokenizer.flush())
        if self._stop.found is not None:
            self.finish_reason = FinishReason.STOP
            return text
        return text + self._stop.flush()
