"""One forward pass over rows of many sessions, packed as [1, sum of tokens].

Decode rows (one token) and questions (many) mix freely: every token carries its position, masks
come from the positions stored in the slab, and there is no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from gpu_worker.arrays import to_array
from gpu_worker.attention import LayerCall, Partial, bias_of, dense_attention, mark
from gpu_worker.methods.base import Retrieved, Retriever
from gpu_worker.methods.retrieval import attend_layer
from gpu_worker.model import Model
from gpu_worker.resident import LocalSlab
from gpu_worker.session import Session
from gpu_worker.step_trace import StepTrace
from longreach.errors import CoverageTooLow, LongreachError, StaleEpoch
from longreach.types import Span, StorageArray, WorkFigures


@dataclass(slots=True)
class Run:
    """The tokens one session feeds in a step, and what became of them.

    `packed` is their place in the step's rows; `scope` what nodes serve to all of them.
    """

    session: Session
    token_ids: tuple[int, ...]
    scope: Span
    packed: slice = field(default_factory=lambda: slice(0, 0))
    work: WorkFigures = field(default_factory=WorkFigures)
    coverage: float = 1.0
    hedged_requests: int = 0
    error: LongreachError | None = None

    @property
    def span(self) -> Span:
        """Positions of the tokens."""
        return Span(self.session.length, self.session.length + len(self.token_ids))

    @property
    def asks_nodes(self) -> bool:
        """Whether there is anything to ask, and any use in asking."""
        return len(self.scope) > 0 and self.error is None


@dataclass(slots=True)
class StepClock:
    """Where the time of a step's attention went, seconds."""

    send_s: float = 0.0
    local_s: float = 0.0
    wait_s: float = 0.0
    merge_s: float = 0.0
    node_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Group:
    """Runs of equal length in neighbouring slots: one batched attention over a view of the slab."""

    packed: slice
    slots: slice
    tokens: int


class Step:
    """Packed rows, their local attention and the KV they made."""

    def __init__(
        self,
        runs: Sequence[Run],
        slab: LocalSlab,
        retriever: Retriever,
        deadline: float,
        trace: StepTrace | None = None,
    ) -> None:
        self.runs = sorted(runs, key=lambda run: (len(run.token_ids), run.session.slot))
        self.slab = slab
        self.retriever = retriever
        self.deadline = deadline
        self.trace = trace
        self.clock = StepClock()
        self.new_kv: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._groups = _pack(self.runs)
        self._biases: dict[tuple[int, int, int], torch.Tensor] = {}
        device = slab.device
        positions = [p for run in self.runs for p in range(run.span.start, run.span.stop)]
        slots = [run.session.slot for run in self.runs for _ in run.token_ids]
        boundaries = [run.scope.stop for run in self.runs for _ in run.token_ids]
        ids = [token for run in self.runs for token in run.token_ids]
        self.input_ids = torch.tensor([ids], device=device)
        self.positions = torch.tensor(positions, device=device)
        self.last_rows = torch.tensor([run.packed.stop - 1 for run in self.runs], device=device)
        self._slots = torch.tensor(slots, device=device)
        self._boundaries = torch.tensor(boundaries, device=device)
        self._columns = [kind.column_of(self.positions) for kind in slab.kinds]
        for stored, columns in zip(slab.positions, self._columns, strict=True):
            stored[self._slots, columns] = self.positions

    def cache(self) -> Cache:
        """What the model's forward pass takes as its past."""
        return Cache(layers=[_StepLayer(self, layer) for layer in range(len(self.slab.layers))])

    def forward(self, model: Model) -> torch.Tensor:
        """Runs the model; returns the logits [runs, vocab] after each run's last token."""
        return model.forward(
            input_ids=self.input_ids,
            position_ids=self.positions[None],
            past_key_values=self.cache(),
            logits_to_keep=self.last_rows,
        )

    def new_arrays(self) -> list[tuple[StorageArray, StorageArray]]:
        """New keys [kv_heads, T, d] and values of every layer, on the host."""
        return [(to_array(keys), to_array(values)) for keys, values in self.new_kv]

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Puts new keys and values [1, kv_heads, T, d] into the slab."""
        columns = self._columns[self.slab.kind_of[layer]]
        self.slab.keys[layer][self._slots, :, columns] = keys[0].transpose(0, 1)
        self.slab.values[layer][self._slots, :, columns] = values[0].transpose(0, 1)
        self.new_kv.append((keys[0], values[0]))

    def attend_locally(self, layer: int, rows: torch.Tensor, call: LayerCall) -> Partial:
        """Attention of rows [T, q_heads, d] over the resident sets: output [T, q_heads, dv]."""
        outputs, lses = [], []
        geometry = self.slab.layers[layer]
        for index, group in enumerate(self._groups):
            keys = self.slab.keys[layer][group.slots]
            values = self.slab.values[layer][group.slots]
            batch, kv_heads = keys.shape[0], geometry.kv_heads
            # The group of a KV head and the tokens share one axis, token-major.
            folded = rows[group.packed].reshape(batch, group.tokens, kv_heads, geometry.group, -1)
            folded = folded.transpose(1, 2).flatten(2, 3)
            bias = self._bias(index, self.slab.kind_of[layer], geometry.group)
            part = dense_attention(folded, keys, values, call.scale, call.softcap, bias)
            shape = (batch, kv_heads, group.tokens, geometry.group)
            tokens = batch * group.tokens
            output = part.output.reshape(*shape, -1).transpose(1, 2)
            outputs.append(output.reshape(tokens, geometry.q_heads, -1))
            lses.append(part.lse.reshape(shape).transpose(1, 2).reshape(tokens, geometry.q_heads))
        if len(outputs) == 1:
            return Partial(outputs[0], lses[0])
        return Partial(torch.cat(outputs), torch.cat(lses))

    def account(self, run: Run, answer: Retrieved) -> None:
        """Adds one layer's answer to the run; fails it where less answered than it allows."""
        run.work = run.work + answer.work
        run.hedged_requests += answer.hedged_requests
        coverage = answer.work.coverage
        run.coverage = min(run.coverage, coverage)
        error = answer.error
        if error is None:
            return
        if isinstance(error, StaleEpoch):
            run.error = error
        elif coverage < run.session.min_coverage:
            run.error = CoverageTooLow(
                f"only {coverage:.1%} of the keys in scope answered, the session allows no less "
                f"than {run.session.min_coverage:.1%}; {error.message}",
                retry_after_s=error.retry_after_s,
            )

    def _bias(self, index: int, kind: int, group_size: int) -> torch.Tensor:
        """Additive mask [slots, 1, tokens * group, columns] of a group: once per step and kind."""
        found = self._biases.get((index, kind, group_size))
        if found is not None:
            return found
        group = self._groups[index]
        sliding = self.slab.kinds[kind].sliding_window
        held = self.slab.positions[kind][group.slots][:, None, :]
        at = self.positions[group.packed].reshape(-1, group.tokens, 1)
        keep = (held >= 0) & (held <= at)
        if sliding:
            keep &= held > at - sliding
        else:
            boundary = self._boundaries[group.packed].reshape(-1, group.tokens, 1)
            keep &= (held < self.slab.sink) | (held >= boundary)
        bias = bias_of(keep)
        if group.tokens > 1:
            bias = bias.repeat_interleave(group_size, 1)
        self._biases[index, kind, group_size] = bias[:, None]
        return bias[:, None]


def _pack(runs: Sequence[Run]) -> list[_Group]:
    """Gives every run its place, and groups runs that one batched attention can serve."""
    groups: list[_Group] = []
    at = 0
    for run in runs:
        tokens, slot = len(run.token_ids), run.session.slot
        run.packed = slice(at, at + tokens)
        at += tokens
        last = groups[-1] if groups else None
        if last and last.tokens == tokens and last.slots.stop == slot:
            groups[-1] = _Group(
                slice(last.packed.start, at), slice(last.slots.start, slot + 1), tokens
            )
        else:
            groups.append(_Group(run.packed, slice(slot, slot + 1), tokens))
    return groups


class _StepLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's cache as transformers sees it: takes new KV, names who attends."""

    is_sliding = False

    def __init__(self, step: Step, layer: int) -> None:
        super().__init__()
        self._step = step
        self._layer = layer

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare: the slab exists."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new keys and values [1, kv_heads, T, d]."""
        self._step.store(self._layer, key_states, value_states)
        return mark(key_states, self), value_states

    def attend(self, queries: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Attention of the whole step at this layer."""
        return attend_layer(self._step, self._layer, queries, call)

    def get_seq_length(self) -> int:
        """Unused: positions are explicit."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Unused: no mask is made."""
        return query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1
