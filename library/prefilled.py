"""A context prefilled once under one prefill method, for any number of questions and methods."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpu_worker.arrays import to_tensor
from gpu_worker.attention import LayerCall
from gpu_worker.chunking import FixedChunks, sample_positions
from gpu_worker.model import Model
from gpu_worker.patterns.spec import pattern_for_model
from gpu_worker.prefill import PrefillJob
from library.decode.base import LayerContext, QueryRecord
from library.queries import QueryRecorder
from longreach.types import IntArray, StorageArray

CHUNK_TOKENS = 2048


class Prefilled:
    """Keys, values and kept queries of a context at every layer, on the model's device.

    keys[layer] [kv_heads, n, head_dim] and values[layer] are contiguous and never written again.
    `density`: (row, key) pairs attended / pairs visible in the layers that the prefill method
    served; 1.0 for dense attention.
    """

    def __init__(
        self,
        model: Model,
        context: Sequence[int],
        prefill: str = "dense",
        *,
        every_query: bool = False,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        self.model = model
        self.context = tuple(context)
        self.prefill = prefill
        self.every_query = every_query
        options = {"dtype": model.dtype, "device": model.device}
        tokens = len(self.context)
        shapes = [(g.kv_heads, tokens, g.head_dim, g.value_dim) for g in model.layers]
        self.keys = [torch.empty(h, n, d, **options) for h, n, d, _ in shapes]
        self.values = [torch.empty(h, n, dv, **options) for h, n, _, dv in shapes]
        self._records: dict[int, QueryRecord] = {}
        self._layers: dict[tuple[int, LayerCall], LayerContext] = {}
        pattern = pattern_for_model(prefill, model.info)
        job = _RecordingJob(
            self.context,
            model.layers,
            self,
            FixedChunks(chunk_tokens),
            pattern=None if pattern.name == "dense" else pattern,
        )
        job.keep_mean = every_query
        if tokens:
            job.run(model.module, model.device)
        self._records = job.records
        self.density = job.pairs_attended / job.pairs_visible if job.pairs_visible else 1.0

    @property
    def tokens(self) -> int:
        """Positions of the context."""
        return len(self.context)

    def put(self, layer: int, start: int, keys: StorageArray, values: StorageArray) -> None:
        """Takes a chunk of the prefill."""
        span = slice(start, start + keys.shape[1])
        self.keys[layer][:, span] = to_tensor(keys)
        self.values[layer][:, span] = to_tensor(values)

    def put_queries(self, layer: int, positions: IntArray, queries: StorageArray) -> None:
        """Takes the sampled queries of a layer: the last thing that is known of it."""

    def layer(self, number: int, call: LayerCall) -> LayerContext:
        """The context at a layer of full attention; the same object at every call."""
        geometry = self.model.layers[number]
        key = (number, LayerCall(call.scale, call.softcap))
        if key not in self._layers:
            self._layers[key] = LayerContext(
                geometry,
                self.keys[number],
                self.values[number],
                self._records.get(number) or self._no_queries(number),
                call,
                self.keys[number][:, :0],
            )
        return self._layers[key]

    def _no_queries(self, number: int) -> QueryRecord:
        """The record of a layer of an empty context."""
        geometry = self.model.layers[number]
        none = self.keys[number].new_empty(geometry.q_heads, 0, geometry.head_dim)
        return QueryRecorder().record(none)


class _RecordingJob(PrefillJob):
    """A prefill that keeps what methods need of the queries."""

    keep_mean = False

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.records: dict[int, QueryRecord] = {}
        self._recorder: QueryRecorder | None = None

    def sample(self, layer: int, start: int, queries: torch.Tensor) -> None:
        """Records a chunk's queries [q_heads, n, d]."""
        super().sample(layer, start, queries)
        if self.layers[layer].sliding_window:
            return
        if start == 0:
            heads = self.layers[layer].kv_heads if self.keep_mean else 0
            self._recorder = QueryRecorder(heads, sample_positions(self.tokens))
        assert self._recorder is not None
        self._recorder.add(start, queries)
        if start + queries.shape[1] == self.tokens:
            self.records[layer] = self._recorder.record(queries[:, :0])
