"""The cache of an attached model: transformers' own, whose layers know who attends them.

Keys and values stay where transformers keeps them, so whatever it does to a cache (growing,
cropping, repeating for beams, reordering) is done to ours, and a cache outlives the attachment: to
an unattached model these are ordinary dynamic layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from library.sequence import LayerSequence, Methods
from longreach.errors import InvalidRequest
from longreach.types import LayerGeometry

_LAYER = "longreach_layer"


class AttachedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values of a batch, and how each sequence's are attended."""

    def __init__(self, geometry: LayerGeometry, methods: Methods) -> None:
        super().__init__()
        self.geometry = geometry
        self.methods = methods
        self._sequences: list[LayerSequence] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores keys and values [B, kv_heads, T, d]; returns all of them, marked as ours."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        marked = keys[:]
        setattr(marked, _LAYER, self)
        return marked, values

    def sequence(self, row: int) -> LayerSequence:
        """How a row of the batch is attended."""
        while len(self._sequences) <= row:
            self._sequences.append(LayerSequence(self.geometry, self.methods))
        return self._sequences[row]

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self._sequences = []

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last -tokens_to_remove positions of every sequence."""
        before = self.get_seq_length()
        super().crop(tokens_to_remove)
        for each in self._sequences:
            each.crop_last(before - self.get_seq_length())

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        super().reorder_cache(beam_idx)
        self._take([int(i) for i in beam_idx])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._take([i for i in range(len(self._sequences)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only these rows."""
        super().batch_select_indices(indices)
        rows = torch.arange(len(self._sequences))[indices.cpu()]
        self._take([int(i) for i in rows])

    def _take(self, rows: Sequence[int]) -> None:
        if self._sequences:
            self._sequences = [self._sequences[row].copy() for row in rows]


def layer_of(keys: torch.Tensor) -> AttachedLayer | None:
    """The layer that returned these keys, if it is ours."""
    found: AttachedLayer | None = getattr(keys, _LAYER, None)
    return found


def adopt(cache: Cache, geometries: Sequence[LayerGeometry], methods: Methods) -> None:
    """Makes the full-attention layers of a dynamic cache attend by `methods`, keeping their keys.

    Raises InvalidRequest for another kind of cache.
    """
    if cache.offloading:
        raise InvalidRequest("an offloaded cache cannot be attached; use a DynamicCache")
    for number, geometry in enumerate(geometries):
        held = cache.layers[number] if number < len(cache.layers) else DynamicLayer()
        if not isinstance(held, DynamicLayer):
            raise InvalidRequest(
                f"a cache with layers of type {type(held).__name__} cannot be attached; use a "
                "DynamicCache, which is what generate() makes by default"
            )
        if number >= len(cache.layers):
            cache.layers.append(held)
        if geometry.sliding_window:
            continue
        if isinstance(held, AttachedLayer) and held.methods is methods:
            continue
        if isinstance(held, DynamicSlidingWindowLayer):
            raise InvalidRequest(
                f"layer {number} of the cache keeps a sliding window where the model attends all"
            )
        cache.layers[number] = _adopted(held, geometry, methods)


def _adopted(held: DynamicLayer, geometry: LayerGeometry, methods: Methods) -> AttachedLayer:
    layer = AttachedLayer(geometry, methods)
    if held.is_initialized:
        layer.lazy_initialization(held.keys, held.values)
        layer.keys, layer.values = held.keys, held.values
    return layer
