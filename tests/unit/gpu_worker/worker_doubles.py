"""Doubles of the node tier: exact, in this process, with failures to order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from gpu_worker.appends import Appends
from gpu_worker.asks import NodeSession
from gpu_worker.chunking import ChunkSizer, FixedChunks
from gpu_worker.conformance import RetrieverSink
from gpu_worker.decoding import Decoder
from gpu_worker.methods.in_process import InProcessRetriever
from gpu_worker.model import Model
from gpu_worker.prefill import PrefillJob
from gpu_worker.resident import LocalSlab
from gpu_worker.routes import plan_route
from gpu_worker.session import Session
from longreach.errors import LongreachError
from longreach.steps import StepOutcome, StepRow
from longreach.types import (
    AppendEntry,
    Budget,
    LayerGeometry,
    SamplingParams,
    SessionRecord,
    Shard,
    ShardMap,
    Span,
)

NODE = "node-0"


def one_shard(layers: Sequence[LayerGeometry], tokens: int) -> ShardMap:
    shard = Shard(
        "all",
        Span(0, tokens),
        tuple(layer.layer for layer in layers),
        0,
        layers[0].kv_heads,
        (NODE,),
    )
    return ShardMap((shard,), {NODE: "here"}, "test")


class AckingStream:
    """An AppendStream whose node stores into an in-process retriever and answers at once.

    While `error` is set every entry is refused with it; while `silent`, nothing is answered.
    """

    def __init__(self, on_ack: Callable[[int, int, LongreachError | None], None]) -> None:
        self.on_ack = on_ack
        self.entries: list[AppendEntry] = []
        self.error: LongreachError | None = None
        self.silent = False

    def submit(self, entries: Sequence[AppendEntry]) -> None:
        for entry in entries:
            if self.silent:
                continue
            if self.error is not None:
                self.on_ack(entry.handle, entry.start, self.error)
                continue
            self.entries.append(entry)
            self.on_ack(entry.handle, entry.start + len(entry.token_ids), None)

    def close(self) -> None:
        pass


class LocalWorker:
    """A decoder over an exact in-process node tier: what a worker is, without RPC.

    The tier's tail is what the worker appended, so that a wrong append is a wrong answer.
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int = 4,
        sink: int = 8,
        window: int = 40,
        max_row_tokens: int = 24,
    ) -> None:
        self.model = model
        self.slab = LocalSlab(
            model.layers,
            slots=slots,
            sink=sink,
            window=window,
            max_row_tokens=max_row_tokens,
            dtype=model.dtype,
            device=model.device,
        )
        self.retriever = InProcessRetriever(model.layers)
        self.stream: AckingStream | None = None
        self.appends = Appends(model.layers, self._open_stream)
        self.decoder = Decoder(model, self.slab, self.retriever, self.appends, append_timeout_s=0.3)
        self.logits: list[torch.Tensor] = []
        self._names: dict[int, str] = {}
        self._watch_logits()

    def prefill(
        self, session_id: str, tokens: Sequence[int], sizer: ChunkSizer | None = None, **job: Any
    ) -> torch.Tensor:
        sink = RetrieverSink(self.retriever, session_id)
        return PrefillJob(tokens, self.model.layers, sink, sizer or FixedChunks(64), **job).run(
            self.model.module, self.model.device
        )

    def open(
        self,
        session_id: str,
        tokens: int,
        sampling: SamplingParams | None = None,
        min_coverage: float = 1.0,
    ) -> Session:
        """Opens a session over the first `tokens` of what was prefilled under its name."""
        slot = self.slab.acquire()
        for layer in range(len(self.model.layers)):
            keys, values = self.retriever.stored(session_id, layer)
            for span in self.slab.kinds[self.slab.kind_of[layer]].resident(
                tokens, self.slab.window
            ):
                part = slice(span.start, span.stop)
                self.slab.place(layer, slot, span.start, 0, keys[:, part], values[:, part])
        self.slab.occupy(slot, tokens)
        handle = len(self._names) + 1
        self._names[handle] = session_id
        route = plan_route(one_shard(self.model.layers, tokens), self.model.layers, tokens)
        record = SessionRecord(
            session_id, "ctx", tokens, "", 1, sampling=sampling or SamplingParams()
        )
        session = Session(record, Budget(exact=True), min_coverage, slot, tokens, route, 0.0)
        self.appends.open(session_id, 1, NodeSession(route, {NODE: handle}), tokens)
        self.decoder.sessions[session_id] = session
        return session

    def feed(self, session_id: str, tokens: Sequence[int], sample: bool = True) -> StepOutcome:
        return self.step([self.row(session_id, tokens, sample)])

    def row(self, session_id: str, tokens: Sequence[int], sample: bool = True) -> StepRow:
        length = self.decoder.sessions[session_id].length
        return StepRow(session_id, length, tuple(tokens), sample, 0)

    def step(self, rows: Sequence[StepRow]) -> StepOutcome:
        return self.decoder.step(rows)

    def _open_stream(self, address: str, on_ack: Any) -> AckingStream:
        self.stream = AckingStream(on_ack)
        submit = self.stream.submit

        def store(entries: Sequence[AppendEntry]) -> None:
            assert self.stream is not None
            before = len(self.stream.entries)
            submit(entries)
            for entry in self.stream.entries[before:]:
                for block in entry.blocks:
                    for axis, layer in enumerate(block.layers):
                        self.retriever.append(
                            self._names[entry.handle], layer, block.keys[axis], block.values[axis]
                        )

        self.stream.submit = store  # type: ignore[method-assign]
        return self.stream

    def _watch_logits(self) -> None:
        """Keeps the logits of each step by session, in the order of the step's runs."""
        forward = self.decoder._forward
        self.last_logits: dict[str, torch.Tensor] = {}

        def watched(step: Any) -> Any:
            logits = forward(step)
            if logits is not None:
                self.last_logits = {
                    run.session.session_id: row for run, row in zip(step.runs, logits, strict=True)
                }
            return logits

        self.decoder._forward = watched  # type: ignore[method-assign]


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.002)


def bits_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return np.array_equal(one.numpy(), other.numpy())
