"""Prefill: layer by layer, and within a layer chunk by chunk.

The model's own forward drives the layers; each decoder layer is wrapped once at load and, given a
`PrefillCache`, runs on a chunk of tokens at a time and writes into the hidden states in place.
One buffer holds the keys and values of the layer under way and is used again by the next layer, so
the device holds weights + O(prompt x hidden) + one layer's KV. Between two chunks the job's `point`
runs other sessions' steps or raises to cancel.

Keys, values and a sample of the queries of each chunk go to a sink as soon as they exist. The last
layer's output matters for the last chunk only, so its other chunks stop once their KV is taken.

A sparse pattern replaces dense attention in layers of full attention without a softcap. One that
needs the whole prompt sweeps the layer twice: first for keys, values and the last queries.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from gpu_worker.arrays import to_array, to_tensor
from gpu_worker.attention import LayerCall, Partial, apply_sinks, causal_attention, mark
from gpu_worker.chunking import MIN_CHUNK_TOKENS, ChunkSizer, sample_positions
from gpu_worker.patterns import Pattern, attend_chunk
from longreach.types import IntArray, LayerGeometry, StorageArray

PROBE_QUERIES = 64
"""Last queries of the prompt that patterns which need it are given."""


class KvSink(Protocol):
    """Takes the KV of a prefill, in the order it is made."""

    def put(self, layer: int, start: int, keys: StorageArray, values: StorageArray) -> None:
        """Keys [kv_heads, n, head_dim] and values of positions from `start`; owned by the sink."""

    def put_queries(self, layer: int, positions: IntArray, queries: StorageArray) -> None:
        """Sampled queries [q_heads, n, head_dim] of a whole layer, after its last keys."""


class Point(Protocol):
    """Called before each chunk: reports progress, runs other work, raises to cancel.

    Returns whether other sessions are decoding, which makes chunks short.
    """

    def __call__(self, layer: int, tokens_done: int) -> bool:
        """`tokens_done` of the layer's tokens are through."""


class _ChunkTaken(Exception):
    """Ends a chunk of the last layer whose output nobody needs."""


class PrefillJob:
    """One context being prefilled. Used by the thread that owns the device only.

    `pattern` is None for dense attention. `pairs_attended` and `pairs_visible` count the (row, key)
    pairs of the layers that it served; their ratio is the density that was really run. `calls`:
    what each layer asked of its attention, once it ran. `query_positions` ascending: whose queries
    are kept; None for a sample that serves indexes.

    With a `start` only the tokens from there on are computed; `earlier(layer)` gives the keys
    [kv_heads, start, head_dim] and values of those before, layers ascending.
    """

    def __init__(
        self,
        token_ids: Sequence[int],
        layers: Sequence[LayerGeometry],
        sink: KvSink,
        sizer: ChunkSizer,
        point: Point = lambda layer, tokens_done: False,
        pattern: Pattern | None = None,
        query_positions: IntArray | None = None,
        start: int = 0,
        earlier: Callable[[int], tuple[StorageArray, StorageArray]] | None = None,
    ) -> None:
        self.token_ids = token_ids
        self.tokens = len(token_ids)
        self.start = start
        self.earlier = earlier
        self.layers = tuple(layers)
        self.sink = sink
        self.sizer = sizer
        self.point = point
        self.pattern = pattern
        self.pairs_attended = 0
        self.pairs_visible = 0
        self.calls: dict[int, LayerCall] = {}
        positions = sample_positions(self.tokens) if query_positions is None else query_positions
        self._positions = positions[positions >= start]
        self._sampled: list[StorageArray] = []
        self._buffers: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def run(self, model: torch.nn.Module, device: torch.device) -> torch.Tensor:
        """Runs the whole prefill; returns the logits [vocab] after the last token."""
        ids = torch.tensor([list(self.token_ids[self.start :])], device=device)
        positions = torch.arange(self.start, self.tokens, device=device)[None]
        with torch.inference_mode():
            output = model(
                input_ids=ids,
                position_ids=positions,
                past_key_values=PrefillCache(self),
                use_cache=True,
                logits_to_keep=1,
            )
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def buffer(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for one layer's keys and values, shared by layers of equal shape."""
        shape = (keys.shape[1], keys.shape[3], values.shape[3])
        if shape not in self._buffers:
            self._buffers[shape] = (
                keys.new_empty(shape[0], self.tokens, shape[1]),
                values.new_empty(shape[0], self.tokens, shape[2]),
            )
        return self._buffers[shape]

    def sample(self, layer: int, start: int, queries: torch.Tensor) -> None:
        """Keeps the sampled ones of a chunk's queries [q_heads, n, d]; sends them with the last.

        Sliding-window layers are never searched, so theirs are not kept.
        """
        if self.layers[layer].sliding_window:
            return
        stop = start + queries.shape[1]
        low, high = np.searchsorted(self._positions, (start, stop))
        at = torch.from_numpy(self._positions[low:high] - start).to(queries.device)
        self._sampled.append(to_array(queries[:, at]))
        if stop == self.tokens:
            self.sink.put_queries(layer, self._positions, np.concatenate(self._sampled, axis=1))
            self._sampled.clear()


class PrefillCache(Cache):  # type: ignore[misc]
    """The cache of a prefill: tells the wrapped decoder layers to run in chunks."""

    def __init__(self, job: PrefillJob) -> None:
        self.job = job
        last = len(job.layers) - 1
        super().__init__(
            layers=[_PrefillLayer(job, i, is_last=i == last) for i in range(len(job.layers))]
        )


class _PrefillLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values so far, and the sweep over its chunks."""

    is_sliding = False

    def __init__(self, job: PrefillJob, layer: int, *, is_last: bool) -> None:
        super().__init__()
        self._job = job
        self._layer = layer
        self._is_last = is_last
        self._start = 0
        self._stop = 0
        self._sweep = 0
        self._last_queries: torch.Tensor | None = None
        self._probed: object = None
        pattern = None if job.layers[layer].sliding_window else job.pattern
        self._pattern = pattern = None if pattern is None else pattern.for_layer(layer)
        self.sweeps = 2 if pattern is not None and pattern.needs == "prompt" else 1

    def begin(self, sweep: int) -> None:
        """Starts over at the first chunk; KV is taken by the first sweep, attended by the last."""
        self._sweep = sweep
        self._start = self._stop = self._job.start

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes the buffer that the layer before has finished with."""
        self.keys, self.values = self._job.buffer(key_states, value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes keys and values [1, kv_heads, chunk, d] of the next positions."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._start, self._stop = self._stop, self._stop + key_states.shape[2]
        if self._sweep > 0:
            return mark(key_states, self), value_states
        if self._start == self._job.start and self._job.earlier is not None:
            keys, values = self._job.earlier(self._layer)
            self.keys[:, : self._start] = to_tensor(keys, self.keys.device)
            self.values[:, : self._start] = to_tensor(values, self.values.device)
        chunk = slice(self._start, self._stop)
        self.keys[:, chunk] = key_states[0]
        self.values[:, chunk] = value_states[0]
        self._job.sink.put(
            self._layer,
            self._start,
            to_array(key_states[0]),
            to_array(value_states[0]),
        )
        return mark(key_states, self), value_states

    def attend(self, queries: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Causal attention of the chunk's queries [q_heads, chunk, d]."""
        self._job.calls[self._layer] = call
        if self._sweep == 0:
            self._job.sample(self._layer, self._start, queries)
        if self._sweep < self.sweeps - 1:
            self._remember(queries)
            raise _ChunkTaken
        if self._is_last and self._stop < self._job.tokens:
            raise _ChunkTaken
        part = self._attend(queries, call)
        rows_first = Partial(part.output.transpose(0, 1), part.lse.transpose(0, 1))
        return apply_sinks(rows_first, call.sinks)

    def _attend(self, queries: torch.Tensor, call: LayerCall) -> Partial:
        keys, values = self.keys[:, : self._stop], self.values[:, : self._stop]
        if self._pattern is None or call.softcap > 0:
            return causal_attention(
                queries,
                keys,
                values,
                self._start,
                call.scale,
                call.softcap,
                call.sliding_window,
            )
        if self._probed is None and self._last_queries is not None:
            self._probed = self._pattern.probe(self._last_queries, self.keys, call.scale)
        job = self._job
        result = attend_chunk(
            self._pattern,
            queries,
            keys,
            values,
            self._start,
            job.tokens,
            call.scale,
            self._probed,
        )
        job.pairs_attended += result.pairs_attended
        job.pairs_visible += result.pairs_visible
        return Partial(result.output, result.lse)

    def _remember(self, queries: torch.Tensor) -> None:
        """Keeps the last queries so far, which may lie in two chunks."""
        before = [] if self._last_queries is None else [self._last_queries]
        self._last_queries = torch.cat([*before, queries], 1)[:, -PROBE_QUERIES:]

    def get_seq_length(self) -> int:
        """Unused: positions are explicit."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Unused: no mask is made."""
        return query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The decoder layers of a transformers model, in order."""
    return [
        module
        for module in model.get_decoder().modules()
        if isinstance(module, GradientCheckpointingLayer)
    ]


def wrap_decoder_layers(model: Any) -> None:
    """Makes every decoder layer run in chunks when it is given a PrefillCache.

    Done once, at load. The wrapper holds no state: the cache is in the arguments, so steps of other
    sessions pass through the same layers between two chunks.
    """
    for number, layer in enumerate(decoder_layers(model)):
        layer.forward = _in_chunks(layer.forward, number)


def _in_chunks(inner: Callable[..., Any], layer: int) -> Callable[..., Any]:
    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        cache = next((x for x in given if isinstance(x, PrefillCache)), None)
        if cache is None:
            return inner(hidden, *args, **kwargs)
        state = cache.layers[layer]
        for sweep in range(state.sweeps):
            state.begin(sweep)
            _run_chunks(cache.job, inner, layer, hidden, args, kwargs)
        return hidden[:, -1:] if layer == len(cache.job.layers) - 1 else hidden

    return forward


def _run_chunks(
    job: PrefillJob,
    inner: Callable[..., Any],
    layer: int,
    hidden: torch.Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """One sweep of a decoder layer over the prompt from the job's start, into `hidden` in place."""
    start, tokens = 0, job.tokens - job.start
    # The last layer's output is needed from its last chunk only: that one is short.
    last_start = (tokens - 1) // MIN_CHUNK_TOKENS * MIN_CHUNK_TOKENS
    while start < tokens:
        shared = job.point(layer, start)
        stop = min(start + job.sizer.next_tokens(shared), tokens)
        if layer == len(job.layers) - 1 and start < last_start:
            stop = min(stop, last_start)
        chunk = slice(start, stop)
        began = time.perf_counter()
        try:
            output = inner(
                hidden[:, chunk],
                *(_cut(x, chunk, tokens) for x in args),
                **{name: _cut(x, chunk, tokens) for name, x in kwargs.items()},
            )
            hidden[:, chunk] = output[0] if isinstance(output, tuple) else output
        except _ChunkTaken:
            pass
        job.sizer.took(chunk.stop - chunk.start, time.perf_counter() - began)
        start = chunk.stop


def _cut(value: Any, chunk: slice, tokens: int) -> Any:
    """The chunk's part of an argument that has the token axis second; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value[:, chunk] if value.ndim >= 2 and value.shape[1] == tokens else value
    if isinstance(value, tuple):
        return tuple(_cut(each, chunk, tokens) for each in value)
    return value
