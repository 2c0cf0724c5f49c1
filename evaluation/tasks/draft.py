"""Sizes a haystack: the largest that fits, filled up to the exact number of tokens.

A task writes a `Draft` of any number of units (sentences, pairs, documents). `fit` finds the
largest number that leaves room for the question and the generated tokens, by binary search with the
model's tokenizer, as RULER does. What is still missing, less than one unit, is filled by the last
tokens of `filler`, so that the haystack begins in the middle of a sentence, like any excerpt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from evaluation.encoding import Encoder
from evaluation.tasks.base import Sample, Spec
from longreach.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Query:
    """A question as text; see Sample."""

    text: str
    references: tuple[str, ...]
    answer_tokens: int
    scorer: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Draft:
    """A haystack as text: preamble, body, and what is asked. `filler` fills it up in front."""

    preamble: str
    body: str
    queries: tuple[Query, ...]
    filler: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def fit(
    task: str,
    spec: Spec,
    write: Callable[[int], Draft],
    *,
    least: int = 1,
    most: int | None = None,
) -> list[Sample]:
    """Samples of `spec.length` tokens exactly, over the largest draft that fits.

    `write(units)` must give the same draft whenever it is called with the same number. Raises
    InvalidRequest when a draft of `least` units is too long already.
    """
    encoder = spec.encoder
    smallest = draft_tokens(write(least), encoder)
    if smallest > spec.length:
        raise InvalidRequest(
            f"task {task} needs at least {smallest} tokens with this tokenizer; "
            f"the length is {spec.length}: ask for a longer one"
        )
    units = largest_fit(
        lambda count: draft_tokens(write(count), encoder), spec.length, least=least, most=most
    )
    draft = write(units)
    missing = spec.length - draft_tokens(draft, encoder)
    context = (
        *encoder.start_ids,
        *encoder.encode(draft.preamble),
        *_last_tokens(encoder, draft.filler, missing),
        *encoder.encode(draft.body),
    )
    return [
        Sample(
            context_ids=context,
            question_ids=tuple(encoder.encode(query.text)),
            references=query.references,
            answer_tokens=query.answer_tokens,
            scorer=query.scorer,
            metadata={**draft.metadata, **query.metadata, "units": units},
        )
        for query in draft.queries
    ]


def draft_tokens(draft: Draft, encoder: Encoder) -> int:
    """Positions of the draft's longest sample, generated tokens included."""
    asked = max(encoder.count(query.text) + query.answer_tokens for query in draft.queries)
    text = encoder.count(draft.preamble) + encoder.count(draft.body)
    return len(encoder.start_ids) + text + asked


def largest_fit(
    count: Callable[[int], int], limit: int, *, least: int, most: int | None = None
) -> int:
    """The largest n with `count(n)` <= limit, where count grows with n.

    `least` fits. No n above `most` is tried. Counting is dear (it tokenizes a whole haystack), so
    the search starts where the growth so far leads to and interpolates before it halves.
    """

    def size(units: int) -> int:
        return count(units) if most is None or units <= most else limit + 1

    low, low_size = least, count(least)
    step = 8
    while True:
        high = low + step
        high_size = size(high)
        if high_size > limit:
            break
        per_unit = max((high_size - low_size) / step, 0.05)
        step = math.ceil(1.01 * (limit - high_size) / per_unit) + 1
        low, low_size = high, high_size
    halve = False
    while high - low > 1:
        middle = (low + high) // 2
        if not halve and high_size > low_size:
            middle = low + round((high - low) * (limit - low_size) / (high_size - low_size))
        middle = min(max(middle, low + 1), high - 1)
        middle_size = size(middle)
        if middle_size <= limit:
            low, low_size = middle, middle_size
        else:
            high, high_size = middle, middle_size
        halve = not halve
    return low


def _last_tokens(encoder: Encoder, text: str, count: int) -> list[int]:
    if count == 0:
        return []
    ids = encoder.encode(text)
    repeated = ids * math.ceil(count / len(ids))
    return repeated[-count:]
