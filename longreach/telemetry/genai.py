"""The attributes of generations on spans, by OpenTelemetry's semantic conventions (gen_ai.*).

The conventions are not stable yet: every name that is ours to change with them is in this file.
"""

from __future__ import annotations

from collections.abc import Sequence

from longreach.telemetry.tracing import Value
from longreach.types import SamplingParams

PROVIDER = "longreach"
OPERATION = "text_completion"

Attributes = dict[str, Value]


def request(
    request_id: str, model: str, sampling: SamplingParams, max_tokens: int, stops: Sequence[str]
) -> Attributes:
    """What was asked. Texts of prompts and answers are never recorded."""
    attributes: Attributes = {
        "gen_ai.operation.name": OPERATION,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.response.id": request_id,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.seed": sampling.seed,
    }
    if model:
        attributes["gen_ai.request.model"] = model
    if max_tokens:
        attributes["gen_ai.request.max_tokens"] = max_tokens
    if stops:
        attributes["gen_ai.request.stop_sequences"] = list(stops)
    return attributes


def span_name(model: str) -> str:
    """How the span of a request is called."""
    return f"{OPERATION} {model}" if model else OPERATION


def response(
    model: str, finish_reason: str, input_tokens: int, cached_tokens: int, output_tokens: int
) -> Attributes:
    """What came of it; `cached_tokens` of the input were in a stored context."""
    return {
        "gen_ai.response.model": model,
        "gen_ai.response.finish_reasons": [finish_reason],
        "gen_ai.usage.input_tokens": input_tokens,
        "gen_ai.usage.cache_read.input_tokens": cached_tokens,
        "gen_ai.usage.output_tokens": output_tokens,
    }
