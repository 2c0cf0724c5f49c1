"""One layer of one sequence of an attached model: its prompt, then its tokens one by one."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch

from gpu_worker.attention import LayerCall, Partial, causal_attention
from gpu_worker.patterns import Pattern, attend_chunk
from gpu_worker.patterns.base import KEY_BLOCK
from gpu_worker.prefill import PROBE_QUERIES
from library.decode.base import DecodeMethod, LayerContext
from library.layer import LayerDecoder
from library.queries import QueryRecorder
from longreach.types import LayerGeometry, WorkFigures

_CHUNK_TOKENS = 2048
_TAIL_SHARE = 4


@dataclass
class Methods:
    """What a model is attached with, and what it did.

    prefill: None for dense. work: of decode steps, all layers and sequences. pairs_attended,
    pairs_visible: (row, key) pairs of prompts in layers of full attention. kinds: of indexes that
    answered.
    """

    decode: DecodeMethod
    prefill: Pattern | None = None
    work: WorkFigures = field(default_factory=WorkFigures)
    pairs_attended: int = 0
    pairs_visible: int = 0
    kinds: set[str] = field(default_factory=set)


class LayerSequence:
    """Attends the keys of one sequence at one layer; the keys are handed in.

    Tokens that come several at a time are prompt: they attend everything before them, the first
    such run under the prefill method. Tokens that come alone are decoded. The context that a decode
    method is made ready for is what came before the first decoded token; when more prompt comes it
    is made ready anew if it chooses by the last queries, or once what follows the context has
    grown beyond a quarter of it.
    """

    def __init__(self, geometry: LayerGeometry, methods: Methods) -> None:
        self._geometry = geometry
        self._methods = methods
        needs_mean = methods.decode.needs_every_query
        self._recorder = QueryRecorder(geometry.kv_heads if needs_mean else 0)
        self._decoder: LayerDecoder | None = None

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: LayerCall
    ) -> Partial:
        """Attention of the newest T queries [q_heads, T, d] over keys [kv_heads, n, d] of all."""
        start = keys.shape[1] - queries.shape[1]
        if queries.shape[1] == 1 and start > 0:
            part = self._decode(queries, keys, values, call)
        else:
            if self._decoder is not None and self._outgrown(self._decoder, keys.shape[1]):
                self._decoder = None
            part = self._prompt(queries, keys, values, start, call)
        self._recorder.add(start, queries)
        return part

    def crop_last(self, tokens: int) -> None:
        """The last `tokens` positions were removed."""
        left = self._recorder.stop - tokens
        self._recorder.crop(left)
        if self._decoder is not None and self._decoder.context.tokens > left:
            self._decoder = None

    def copy(self) -> LayerSequence:
        """A sequence that goes on from here by itself; what was made ready is shared."""
        other = copy.copy(self)
        other._recorder = self._recorder.copy()
        return other

    def _outgrown(self, decoder: LayerDecoder, tokens: int) -> bool:
        context = decoder.context.tokens
        return self._methods.decode.observes or (tokens - context) * _TAIL_SHARE > context

    def _decode(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: LayerCall
    ) -> Partial:
        if self._decoder is None:
            layer = self._context(queries, keys[:, :-1], values[:, :-1], call)
            self._decoder = LayerDecoder(self._methods.decode, layer)
        context = self._decoder.context.tokens
        attended = self._decoder.attend(queries, keys[:, context:], values[:, context:])
        self._methods.work = self._methods.work + attended.work
        self._methods.kinds.update(filter(None, [self._decoder.kind]))
        return attended.partial

    def _context(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: LayerCall
    ) -> LayerContext:
        """Everything so far, in memory of its own: the cache's grows and moves."""
        own = torch.contiguous_format
        return LayerContext(
            self._geometry,
            keys.clone(memory_format=own),
            values.clone(memory_format=own),
            self._recorder.record(queries[:, :0]),
            LayerCall(call.scale, call.softcap),
            keys[:, :0],
        )

    def _prompt(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        start: int,
        call: LayerCall,
    ) -> Partial:
        """The prompt's rows. A pattern that probes the whole prompt needs it at once, and patterns
        select in blocks of positions: continuations that do not fit are dense."""
        pattern = self._methods.prefill
        pattern = None if pattern is None else pattern.for_layer(self._geometry.layer)
        if pattern is not None and start and (pattern.needs == "prompt" or start % KEY_BLOCK):
            pattern = None
        if pattern is None or call.softcap > 0:
            rows = queries.shape[1]
            pairs = self._geometry.q_heads * (rows * start + rows * (rows + 1) // 2)
            self._count(pairs, pairs)
            return causal_attention(queries, keys, values, start, call.scale, call.softcap)
        return self._sparse(pattern, queries, keys, values, start, call)

    def _sparse(
        self,
        pattern: Pattern,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        start: int,
        call: LayerCall,
    ) -> Partial:
        total, state = keys.shape[1], None
        if pattern.needs == "prompt":
            state = pattern.probe(queries[:, -PROBE_QUERIES:], keys, call.scale)
        outputs, lses = [], []
        for first in range(start, total, _CHUNK_TOKENS):
            stop = min(total, first + _CHUNK_TOKENS)
            rows = queries[:, first - start : stop - start]
            part = attend_chunk(
                pattern, rows, keys[:, :stop], values[:, :stop], first, total, call.scale, state
            )
            self._count(part.pairs_attended, part.pairs_visible)
            outputs.append(part.output)
            lses.append(part.lse)
        return Partial(torch.cat(outputs, 1), torch.cat(lses, 1))

    def _count(self, attended: int, visible: int) -> None:
        self._methods.pairs_attended += attended
        self._methods.pairs_visible += visible
