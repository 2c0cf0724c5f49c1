"""Base of the methods that choose once, by the attention of the prompt's last queries.

Each query head chooses and keeps its own keys, as the published methods do (a group then keeps up
to one copy per query head). The observation window, a question that was fed behind a stored
context, and generated tokens are all kept.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from gpu_worker.attention import LayerCall
from library.decode.base import DecodeMethod, Found, LayerContext, Search
from library.decode.gathered import attend_rows, distinct, read_in_full, take
from longreach.errors import FailedPrecondition
from longreach.types import Span

_LOGIT_BYTES = 256 << 20


class ObservedMethod(DecodeMethod):
    """Keeps a fixed choice of the context before the observation window."""

    observes: ClassVar[bool] = True
    window: int
    """Last tokens of the prompt that observe, and are kept."""

    @abstractmethod
    def choose(self, mass: torch.Tensor) -> torch.Tensor:
        """Positions [q_heads, c] to keep, from the attention mass [q_heads, n] that the window's
        queries together gave each position."""

    def resident(self, context: int, seen: int) -> list[slice]:
        """The window at the context's end and everything after."""
        return [slice(0, 0), slice(max(0, context - self.window), seen)]

    def scope(self, context: int, seen: int) -> Span:
        """Everything before the window."""
        return Span(0, max(0, context - self.window))

    def prepare(self, layer: LayerContext) -> Search | None:
        """Chooses, and gathers what was chosen: once, where only the context observes."""
        stop = max(0, layer.tokens - self.window)
        if stop == 0:
            return None
        if layer.after.shape[1]:
            return self._chosen(layer, stop)
        return layer.once(("chosen", self), lambda: self._chosen(layer, stop))  # type: ignore[no-any-return]

    def _chosen(self, layer: LayerContext, stop: int) -> Search:
        ids = self.choose(observed_mass(layer, self.window)[:, :stop])
        chosen = torch.zeros(layer.geometry.q_heads, stop, dtype=torch.bool, device=ids.device)
        chosen.scatter_(1, ids, torch.ones_like(ids, dtype=torch.bool))
        pairs = int(distinct(chosen, layer.geometry.kv_heads).sum())
        return Chosen(take(layer.keys, ids), take(layer.values, ids), pairs, layer)


@dataclass
class Chosen(Search):
    """Keys [q_heads, c, d] and values of a fixed choice; `pairs` distinct (KV head, position)."""

    keys: torch.Tensor
    values: torch.Tensor
    pairs: int
    layer: LayerContext

    @property
    def held(self) -> int:  # type: ignore[override]
        """One copy per query head."""
        return int(self.keys.shape[0] * self.keys.shape[1])

    def attend(self, queries: torch.Tensor, scope: Span) -> Found:
        """Attention over the choice, which lies in the scope."""
        partial = attend_rows(queries, self.keys, self.values, self.layer.call)
        work = read_in_full(self.pairs * queries.shape[1], self.layer.row_bytes)
        return Found(partial, work)


def observed_mass(layer: LayerContext, window: int) -> torch.Tensor:
    """Attention mass [q_heads, n] that the prompt's last `window` queries gave the context's keys,
    summed over the queries; softmax runs over the whole prompt, causally."""
    queries = layer.queries.last[:, -window:]
    if queries.shape[1] == 0:
        raise FailedPrecondition(
            "the keys to keep are chosen by the prompt's last queries, and none were seen; attach "
            "before the prompt is run, or feed the end of the prompt after",
            reason="NO_QUERY_SAMPLE",
        )
    keys = torch.cat([layer.keys, layer.after], 1) if layer.after.shape[1] else layer.keys
    q_heads, rows, _ = queries.shape
    prompt = keys.shape[1]
    step = max(1, _LOGIT_BYTES // (q_heads * prompt * 4))
    columns = torch.arange(prompt, device=keys.device)
    mass = torch.zeros(q_heads, layer.tokens, device=keys.device)
    for start in range(0, rows, step):
        part = queries[:, start : start + step]
        logits = attention_logits(part, keys, layer.call)
        last_seen = prompt - rows + start + torch.arange(part.shape[1], device=keys.device)
        logits.masked_fill_(columns > last_seen[:, None], -torch.inf)
        mass += logits.softmax(-1)[..., : layer.tokens].sum(1)
    return mass


def attention_logits(queries: torch.Tensor, keys: torch.Tensor, call: LayerCall) -> torch.Tensor:
    """Logits [q_heads, T, n] of queries [q_heads, T, d] against keys [kv_heads, n, d], fp32."""
    grouped = queries.float().unflatten(0, (keys.shape[0], -1)) * call.scale
    logits = (grouped @ keys.float().transpose(1, 2)[:, None]).flatten(0, 1)
    if call.softcap > 0:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    return logits
