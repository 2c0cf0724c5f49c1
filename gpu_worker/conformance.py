"""The gate every model passes at load: longreach's answers against the model's own eager attention.

A random prompt is prefilled in chunks, continued by decode rows and a question whose older keys are
attended by an in-process retriever, and every row's logits are compared with one eager forward pass
over the same tokens. It runs on the loaded model itself, whatever its size: about 240 tokens. What
lies beyond that length (a sliding window of thousands of tokens) is held by the tests on small
models of each family.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import numpy as np
import torch

from gpu_worker.attention import ATTENTION_NAME
from gpu_worker.chunking import FixedChunks
from gpu_worker.geometry import refuse
from gpu_worker.methods.in_process import InProcessRetriever
from gpu_worker.model import Model
from gpu_worker.prefill import PrefillJob
from gpu_worker.resident import LocalSlab
from gpu_worker.routes import Route
from gpu_worker.session import Session
from gpu_worker.step import Run, Step
from longreach.types import Budget, IntArray, SessionRecord, StorageArray

PROMPT_TOKENS = 200
DECODE_TOKENS = 4
QUESTION_TOKENS = 24
SINK_TOKENS = 8
WINDOW_TOKENS = 40

TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 0.16}
"""Largest root-mean-square difference of logits, in standard deviations of the eager logits.

bfloat16 rounds eight times as coarsely as float16. The demo model's eager logits in bfloat16 are
.05 from those in float32, up to .16 in a row, so that two right answers differ by .02 to .08, more
or less by CPU; an attention scale that is wrong by a tenth makes .4 to .5.
"""

LOOKAHEAD_LIMIT = {**TOLERANCE, torch.float32: 1e-4}
"""The same for a token's eager logits with and without the tokens that follow it."""

_SESSION = "conformance"


class RetrieverSink:
    """Keeps the KV of a prefill in an in-process retriever."""

    def __init__(self, retriever: InProcessRetriever, session_id: str) -> None:
        self._retriever = retriever
        self._session_id = session_id

    def put(self, layer: int, start: int, keys: StorageArray, values: StorageArray) -> None:
        """Appends a chunk's keys and values."""
        self._retriever.append(self._session_id, layer, keys, values)

    def put_queries(self, layer: int, positions: IntArray, queries: StorageArray) -> None:
        """Exact attention needs no query sample."""


@dataclass(frozen=True, slots=True)
class Conformance:
    """What the gate measured: differences of logits in standard deviations of the eager ones.
    `lookahead` is eager attention's own, between a token with and without those that follow."""

    prefill: float
    decode: float
    question: float
    lookahead: float

    @property
    def worst(self) -> float:
        """The largest difference from eager attention."""
        return max(self.prefill, self.decode, self.question)


def require_conformance(model: Model) -> Conformance:
    """Raises UnsupportedModel where the model's answers differ from eager attention."""
    try:
        found = measure_conformance(model)
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise refuse(model.info.model, f"a forward pass failed ({error})") from error
    limit = LOOKAHEAD_LIMIT[model.dtype]
    if not found.lookahead <= limit:
        raise refuse(
            model.info.model,
            f"its attention is not causal: a token's logits change by {found.lookahead:.2g} "
            f"standard deviations with the tokens that follow it, the limit is {limit}",
        )
    limit = TOLERANCE[model.dtype]
    if not found.worst <= limit:
        raise refuse(
            model.info.model,
            f"its logits differ from eager attention by {found} standard deviations, "
            f"the limit for {model.info.identity.dtype} is {limit}",
        )
    return found


def measure_conformance(model: Model) -> Conformance:
    """Runs the gate's tokens both ways."""
    after = DECODE_TOKENS + QUESTION_TOKENS
    prompt = min(PROMPT_TOKENS, model.info.max_positions - after)
    total = prompt + after
    drawn = np.random.default_rng(0).integers(0, model.info.vocab_size, total)
    tokens = tuple(int(t) for t in drawn)
    expected = _eager_logits(model, tokens)
    alone = _eager_logits(model, tokens[: prompt // 2])
    lookahead = max(_difference(expected, each, row) for row, each in enumerate(alone))
    slab = LocalSlab(
        model.layers,
        slots=1,
        sink=SINK_TOKENS,
        window=WINDOW_TOKENS,
        max_row_tokens=QUESTION_TOKENS,
        dtype=model.dtype,
        device=model.device,
    )
    retriever = InProcessRetriever(model.layers)
    job = PrefillJob(
        tokens[:prompt], model.layers, RetrieverSink(retriever, _SESSION), FixedChunks(64)
    )
    prefill = job.run(model.module, model.device)
    session = _session(slab, retriever, model, prompt)
    ends = [prompt + i for i in range(DECODE_TOKENS + 1)] + [total]
    got = [
        _feed(model, slab, retriever, session, tokens[start:stop])
        for start, stop in itertools.pairwise(ends)
    ]
    errors = [
        _difference(expected, row, stop - 1)
        for row, stop in zip([prefill, *got], ends, strict=True)
    ]
    return Conformance(errors[0], max(errors[1:-1]), errors[-1], lookahead)


def _eager_logits(model: Model, tokens: tuple[int, ...]) -> torch.Tensor:
    model.module.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            ids = torch.tensor([tokens], device=model.device)
            logits: torch.Tensor = model.module(input_ids=ids, use_cache=False).logits[0]
    finally:
        model.module.set_attn_implementation(ATTENTION_NAME)
    return logits.float()


def _session(slab: LocalSlab, retriever: InProcessRetriever, model: Model, prompt: int) -> Session:
    slot = slab.acquire()
    for layer in range(len(model.layers)):
        kind = slab.kinds[slab.kind_of[layer]]
        keys, values = retriever.stored(_SESSION, layer)
        for span in kind.resident(prompt, slab.window):
            part = slice(span.start, span.stop)
            slab.place(layer, slot, span.start, 0, keys[:, part], values[:, part])
    slab.occupy(slot, prompt)
    record = SessionRecord(_SESSION, "", prompt, "", 0)
    return Session(record, Budget(exact=True), 1.0, slot, prompt, Route((), {}, {}), 0.0)


def _feed(
    model: Model,
    slab: LocalSlab,
    retriever: InProcessRetriever,
    session: Session,
    tokens: tuple[int, ...],
) -> torch.Tensor:
    """Logits after the tokens; the session stands behind them afterwards."""
    run = Run(session, tokens, session.scope(slab.sink, slab.window))
    step = Step([run], slab, retriever, time.monotonic() + 600)
    logits = step.forward(model)
    for layer, (keys, values) in enumerate(step.new_arrays()):
        retriever.append(session.session_id, layer, keys, values)
    session.length += len(tokens)
    return logits[0]


def _difference(expected: torch.Tensor, got: torch.Tensor, row: int) -> float:
    error = (got.float() - expected[row]).square().mean().sqrt()
    return float(error / expected.std())
