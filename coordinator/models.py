"""The models that the cluster serves, and their tokenizers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coordinator.cluster import Cluster, MemberState
from coordinator.requests import Prompt, choose_model
from coordinator.tokenizer import Tokenizer
from longreach.errors import FailedPrecondition, LongreachError
from longreach.steps import ModelInfo
from longreach.types import Identity

# A source that had no tokenizer is not asked again for this long.
RETRY_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class _Failure:
    error: FailedPrecondition
    until: float


class Models:
    """Models of the workers that are alive, and one tokenizer for each source."""

    def __init__(
        self,
        cluster: Cluster,
        load: Callable[[str], Tokenizer] = Tokenizer.load,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._load = load
        self._clock = clock
        self._tokenizers: dict[str, Tokenizer | _Failure] = {}
        self._loading: dict[str, asyncio.Lock] = {}

    def served(self) -> dict[str, ModelInfo]:
        """Models by name."""
        return {
            member.report.worker.model.model: member.report.worker.model
            for member in self._cluster.workers()
            if member.report.worker
        }

    def choose(self, wanted: str) -> ModelInfo:
        """The model a request means (see `choose_model`)."""
        away = {
            member.report.worker.model.model
            for member in self._cluster.members()
            if member.report.worker and member.state is not MemberState.LEAVING
        }
        return choose_model(wanted, self.served(), away)

    def with_identity(self, identity: Identity) -> ModelInfo | None:
        """The model whose KV has this identity (tenant left empty), if a worker runs it."""
        models = [m.report.worker.model for m in self._cluster.workers() if m.report.worker]
        return next((model for model in models if model.identity == identity), None)

    async def tokenizer(self, model: ModelInfo) -> Tokenizer:
        """The tokenizer of a model; raises FailedPrecondition where none can be read."""
        async with self._loading.setdefault(model.source, asyncio.Lock()):
            known = self._tokenizers.get(model.source)
            if isinstance(known, Tokenizer):
                return known
            if known is not None and known.until > self._clock():
                raise known.error
            try:
                loaded = await asyncio.to_thread(self._load, model.source)
            except FailedPrecondition as error:
                self._tokenizers[model.source] = _Failure(error, self._clock() + RETRY_AFTER_S)
                raise
            self._tokenizers[model.source] = loaded
            return loaded

    async def tokenizer_or_none(self, model: ModelInfo) -> Tokenizer | None:
        """The tokenizer, or None: token ids can be served without one."""
        try:
            return await self.tokenizer(model)
        except LongreachError:
            return None

    async def encode(self, model: ModelInfo, prompt: Prompt, *, starts: bool) -> Sequence[int]:
        """Token ids of a prompt; texts are encoded on a thread."""
        if prompt.token_ids is not None:
            return prompt.token_ids
        if not prompt.text:
            return ()
        tokenizer = await self.tokenizer(model)
        return await asyncio.to_thread(tokenizer.encode, prompt.text, starts=starts)
