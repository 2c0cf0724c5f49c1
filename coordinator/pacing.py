"""How many question tokens a step may carry while other sessions decode.

Every token of a question delays the next token of everybody in the step. So what a question token
costs is learnt from the steps' own times, and a step carries as many as fit a time.
"""

from __future__ import annotations

# Fewer tokens than this are hardly cheaper: a step has a fixed cost.
TOKENS_MIN = 16
# Weight of the newest step in the running means.
NEWEST = 0.3


class QuestionPace:
    """Learns the cost of question tokens; `step_s` is the time that they may add to a step, and
    `tokens_max` what a step carries at most."""

    def __init__(self, tokens_max: int, step_s: float) -> None:
        self._tokens_max = tokens_max
        self._step_s = step_s
        self._decode_s = 0.0
        self._token_s = 0.0

    def tokens(self, decoders: int) -> int:
        """Question tokens for the next step, in which so many sessions decode."""
        if not decoders or self._token_s <= 0:
            return self._tokens_max
        fitting = int(self._step_s / self._token_s)
        return min(self._tokens_max, max(TOKENS_MIN, fitting))

    def observe(self, question_tokens: int, step_s: float) -> None:
        """Takes the time of a step (seconds); a pure decode step tells what a step costs anyway."""
        if question_tokens == 0:
            self._decode_s += NEWEST * (step_s - self._decode_s) if self._decode_s else step_s
        elif question_tokens >= TOKENS_MIN:
            cost = max(0.0, step_s - self._decode_s) / question_tokens
            self._token_s += NEWEST * (cost - self._token_s) if self._token_s else cost
