"""Draws tokens: a pure function of (seed, position, logits).

One uniform number per token comes from a counter-based generator keyed by the session's seed and
the token's position, so neither the batch nor the worker that serves a session changes what is
drawn. Log-probabilities are those of the model's own distribution, before temperature and filters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gpu_worker.philox import uniform
from longreach.errors import InvalidRequest
from longreach.types import SamplingParams

MAX_TOP_LOGPROBS = 32
"""Most likely tokens that may be asked for."""
GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them would overflow."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token, its natural log-probability, and the most likely tokens with theirs."""

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


def check_sampling(params: SamplingParams) -> None:
    """Raises InvalidRequest for parameters outside their range."""
    if not 0 <= params.temperature < float("inf"):
        raise InvalidRequest(f"temperature is {params.temperature}; it must be 0 or more")
    if not 0 <= params.top_p <= 1:
        raise InvalidRequest(f"top_p is {params.top_p}; it must be in [0, 1], 0 or 1 for off")
    if params.top_k < 0:
        raise InvalidRequest(f"top_k is {params.top_k}; it must be 0 (off) or more")


def sample(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    top_logprobs: Sequence[int],
) -> list[Drawn]:
    """One token for each row of logits [rows, vocab]; `positions` are those of the new tokens."""
    logits = logits.float()
    logprobs = torch.log_softmax(logits, -1)
    tokens = torch.argmax(logits, -1)
    random = [i for i, p in enumerate(params) if p.temperature >= GREEDY_BELOW]
    if random:
        tokens[random] = _draw(
            logits[random], [params[i] for i in random], [positions[i] for i in random]
        )
    chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
    most = min(max(top_logprobs, default=0), logits.shape[-1])
    best = torch.topk(logprobs, most) if most else None
    drawn = []
    for row, (token, logprob) in enumerate(zip(tokens.tolist(), chosen.tolist(), strict=True)):
        top: tuple[tuple[int, float], ...] = ()
        if best is not None:
            count = min(top_logprobs[row], most)
            ids, values = best.indices[row, :count], best.values[row, :count]
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        drawn.append(Drawn(int(token), float(logprob), top))
    return drawn


def _draw(
    logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> torch.Tensor:
    """Inverse-CDF sampling over the tokens in order of falling probability."""
    device = logits.device
    temperature = torch.tensor([p.temperature for p in params], device=device)
    ordered, tokens = torch.sort(
        logits / temperature[:, None], dim=-1, descending=True, stable=True
    )
    probabilities = torch.softmax(ordered.double(), -1)
    before = probabilities.cumsum(-1) - probabilities
    limit_p = torch.tensor([p.top_p or 1.0 for p in params], device=device, dtype=torch.float64)
    limit_k = torch.tensor([p.top_k or logits.shape[-1] for p in params], device=device)
    rank = torch.arange(logits.shape[-1], device=device)
    # The most likely token always stays, however small top_p is.
    keep = ((before < limit_p[:, None]) | (rank == 0)) & (rank < limit_k[:, None])
    cumulative = (probabilities * keep).cumsum(-1)
    numbers = uniform(np.array([p.seed for p in params], np.uint64), np.array(positions, np.uint64))
    target = torch.from_numpy(numbers).to(device) * cumulative[:, -1]
    place = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    last = keep.long().cumsum(-1)[:, -1] - 1
    return tokens.gather(-1, torch.minimum(place, last)[:, None])[:, 0]
