"""Greedy answers over a prefilled context under any decode method.

The question's tokens are met in one of two ways (`PromptRule`). "stored": the context was stored
before anyone asked, and the question attends it by the same method as the answer; methods that
choose by the prompt's last queries see the end of the context. "whole", the papers' protocol: the
question is part of the prompt, attends everything, and is what such methods choose by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from gpu_worker.attention import LayerCall, Partial, apply_sinks, causal_attention, mark
from library.decode.base import OBSERVED_QUERIES, DecodeMethod
from library.decode.full import Full
from library.layer import LayerDecoder
from library.prefilled import Prefilled
from longreach.errors import InvalidRequest
from longreach.types import WorkFigures

PromptRule = Literal["stored", "whole"]
PROMPT_RULES: tuple[PromptRule, ...] = get_args(PromptRule)


class Question:
    """One question and its answer. `work` adds up what the method did, over layers and tokens.

    `room_tokens` bounds question and answer together.
    """

    def __init__(
        self,
        context: Prefilled,
        method: DecodeMethod,
        room_tokens: int,
        prompt: PromptRule = "stored",
    ) -> None:
        if method.needs_every_query and not context.every_query:
            raise InvalidRequest(
                f"{method.name} needs every query of the context; prefill with every_query=True"
            )
        self.context = context
        self.method = method
        self.prompt = prompt
        self.work = WorkFigures()
        self.kinds: set[str] = set()
        self._room = room_tokens
        self._fed = 0
        model = context.model
        options = {"dtype": model.dtype, "device": model.device}
        self._layers = [
            _QuestionLayer(
                self,
                number,
                torch.empty(g.kv_heads, room_tokens, g.head_dim, **options),
                torch.empty(g.kv_heads, room_tokens, g.value_dim, **options),
            )
            for number, g in enumerate(model.layers)
        ]

    @property
    def resident_share(self) -> float:
        """Keys that the method must keep on the device / keys of all positions seen so far."""
        held = sum(layer.held() for layer in self._layers)
        every = sum(g.kv_heads for g in self.context.model.layers) * self.length
        return held / every if every else 1.0

    @property
    def length(self) -> int:
        """Positions seen so far."""
        return self.context.tokens + self._fed

    def answer(
        self, question: Sequence[int], max_tokens: int, stop_ids: Sequence[int] = ()
    ) -> list[int]:
        """Greedy tokens after the question, without the one that ended them."""
        logits = self.ask(question)
        tokens: list[int] = []
        while len(tokens) < max_tokens:
            token = int(logits.argmax())
            if token in stop_ids:
                break
            tokens.append(token)
            if len(tokens) < max_tokens:
                logits = self.feed([token])
        return tokens

    def ask(self, question: Sequence[int]) -> torch.Tensor:
        """Logits [vocab] after the rest of the prompt."""
        return self._forward(question, dense=self.prompt == "whole")

    def feed(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits [vocab] after more tokens, all of them under the method."""
        return self._forward(tokens, dense=False)

    def _forward(self, tokens: Sequence[int], *, dense: bool) -> torch.Tensor:
        if self._fed + len(tokens) > self._room:
            raise InvalidRequest(
                f"question and answer need {self._fed + len(tokens)} tokens; there is room for "
                f"{self._room}"
            )
        model = self.context.model
        for layer in self._layers:
            layer.dense = dense
        positions = torch.arange(self.length, self.length + len(tokens), device=model.device)
        logits = model.forward(
            input_ids=torch.tensor([list(tokens)], device=model.device),
            position_ids=positions[None],
            past_key_values=Cache(layers=list(self._layers)),
            logits_to_keep=1,
        )
        self._fed += len(tokens)
        return logits[-1]


class _QuestionLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's tail, and who attends it."""

    is_sliding = False

    def __init__(
        self, owner: Question, number: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        super().__init__()
        self.dense = False
        self._owner = owner
        self._number = number
        self._tail_keys = keys
        self._tail_values = values
        self._stop = 0
        self._asked: torch.Tensor | None = None
        self._decoder: LayerDecoder | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores keys and values [1, kv_heads, T, d] behind those held."""
        span = slice(self._stop, self._stop + key_states.shape[2])
        self._tail_keys[:, span] = key_states[0]
        self._tail_values[:, span] = value_states[0]
        self._stop = span.stop
        return mark(key_states, self), value_states

    def attend(self, queries: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Attention of queries [q_heads, T, d]; returns [T, q_heads, value_dim]."""
        context = self._owner.context
        tail = self._tail_keys[:, : self._stop], self._tail_values[:, : self._stop]
        if call.sliding_window:
            part = self._window(queries, tail, call)
        elif self.dense:
            everything = LayerDecoder(Full(), context.layer(self._number, call))
            part = everything.attend(queries, *tail).partial
            self._asked = queries[:, -OBSERVED_QUERIES:]
        else:
            if self._decoder is None:
                self._decoder = self._make_decoder(call)
            attended = self._decoder.attend(queries, *tail)
            self._owner.work = self._owner.work + attended.work
            self._owner.kinds.update(filter(None, [self._decoder.kind]))
            part = attended.partial
        rows = Partial(part.output.transpose(0, 1), part.lse.transpose(0, 1))
        return apply_sinks(rows, call.sinks)

    def held(self) -> int:
        """(KV head, position) pairs to keep on the device."""
        geometry = self._owner.context.model.layers[self._number]
        if geometry.sliding_window:
            return geometry.kv_heads * min(self._owner.length, geometry.sliding_window)
        if self._decoder is None:
            return geometry.kv_heads * self._owner.length
        return self._decoder.held(self._owner.length)

    def _make_decoder(self, call: LayerCall) -> LayerDecoder:
        owner = self._owner
        layer = owner.context.layer(self._number, call)
        if owner.method.observes and self._asked is not None:
            asked = self._tail_keys[:, : owner._fed]
            layer = layer.asked(asked, self._asked)
        return LayerDecoder(owner.method, layer)

    def _window(
        self, queries: torch.Tensor, tail: tuple[torch.Tensor, torch.Tensor], call: LayerCall
    ) -> Partial:
        """A sliding-window layer, which no method changes: its keys are few."""
        context, number = self._owner.context, self._number
        first = max(0, context.tokens - call.sliding_window)
        keys = torch.cat([context.keys[number][:, first:], tail[0]], 1)
        values = torch.cat([context.values[number][:, first:], tail[1]], 1)
        start = keys.shape[1] - queries.shape[1]
        return causal_attention(
            queries, keys, values, start, call.scale, call.softcap, call.sliding_window
        )

    def get_seq_length(self) -> int:
        """Unused: positions are explicit."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Unused: no mask is made."""
        return query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1
