"""Everything that is decided about a generation before it gets a worker's slot."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.admission import Admission
from coordinator.catalog.base import ContextRecord
from coordinator.config import CoordinatorConfig
from coordinator.contexts import Contexts
from coordinator.failover import first_epoch
from coordinator.holdings import without_tenant
from coordinator.models import Models
from coordinator.orphans import SessionNames
from coordinator.requests import (
    GenerateParams,
    answer_tokens,
    check_generate,
    check_token_ids,
)
from coordinator.tokenizer import Tokenizer
from longreach import telemetry
from longreach.errors import IdentityMismatch, Internal, InvalidRequest
from longreach.steps import ModelInfo
from longreach.types import BOUNDARY_TOKENS, Budget, Identity, SessionRecord, ShardMap

_PREFIX_QUERIES = telemetry.counter("prefix_cache_queries")
_PREFIX_HITS = telemetry.counter("prefix_cache_hits")


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked generation, ready to be opened on any worker with this identity."""

    params: GenerateParams
    model: ModelInfo
    identity: Identity
    context: ContextRecord | None
    shard_map: ShardMap
    record: SessionRecord
    budget: Budget
    tokenizer: Tokenizer | None


@dataclass(frozen=True, slots=True)
class _Base:
    """What a session stands on: a context up to `stop` (or none), then the question."""

    context: ContextRecord | None
    stop: int
    question: tuple[int, ...]


class Planner:
    """Turns what a client asked for into a plan, or into an error that says what is wrong."""

    def __init__(
        self,
        contexts: Contexts,
        models: Models,
        admission: Admission,
        config: CoordinatorConfig,
        names: SessionNames,
    ) -> None:
        self._contexts = contexts
        self._models = models
        self._admission = admission
        self._config = config
        self._names = names
        self._default_budget = config.budget()

    async def plan(self, params: GenerateParams) -> Plan:
        """Checks a request and stores its prompt if it is long.

        Raises InvalidRequest, NotFound, FailedPrecondition, ResourceExhausted or Unavailable.
        """
        check_generate(params)
        context = await self._contexts.ready(params.context_id) if params.context_id else None
        model = self._model(params, context)
        prompt = await self._models.encode(model, params.prompt, starts=context is None)
        check_token_ids(prompt, model)
        check_token_ids(params.generated, model)
        max_tokens = answer_tokens(
            params,
            context.tokens if context else 0,
            len(prompt),
            model,
            self._config.default_max_tokens,
        )
        tokenizer = await self._tokenizer(params, model)
        if context is not None:
            base = _Base(context, context.tokens, tuple(prompt))
        elif len(prompt) <= self._config.inline_prompt_tokens:
            base = _Base(None, 0, tuple(prompt))
        else:
            base = await self._store_beginning(model, prompt)
        return self._planned(params, model, base, max_tokens, tokenizer)

    def _planned(
        self,
        params: GenerateParams,
        model: ModelInfo,
        base: _Base,
        max_tokens: int,
        tokenizer: Tokenizer | None,
    ) -> Plan:
        resume = params.resume
        session_id = self._names.new(resume.key if resume else "")
        context, prompt = base.context, base.question
        if context is None:
            identity = dataclasses.replace(model.identity, tenant=self._contexts.tenant)
            shard_map = self._contexts.place_tail(session_id, model, len(prompt) + max_tokens)
        else:
            identity, shard_map = context.identity, context.shard_map
            self._contexts.check_tail(context, model, len(prompt) + max_tokens)
        record = SessionRecord(
            session_id=session_id,
            context_id=context.context_id if context else "",
            context_stop=base.stop,
            tenant=self._contexts.tenant,
            epoch=first_epoch(resume.attempt if resume else 0),
            prompt_ids=prompt,
            sampling=params.sampling,
            stop_ids=() if params.ignore_eos else model.eos_ids,
            stop_texts=params.stop_texts,
            max_tokens=max_tokens,
            generated_ids=params.generated,
            coordinator_id=self._names.coordinator_id,
        )
        budget = params.budget or self._default_budget
        return Plan(params, model, identity, context, shard_map, record, budget, tokenizer)

    def _model(self, params: GenerateParams, context: ContextRecord | None) -> ModelInfo:
        """The model to run: exactly the context's, where there is one."""
        if context is None:
            return self._models.choose(params.model)
        held = without_tenant(context.identity)
        if params.model not in ("", held.model):
            raise InvalidRequest(
                f"context {context.context_id} was stored for model {held.model!r}, not "
                f"{params.model!r}; leave the model out or create the context for this model",
                reason="WRONG_MODEL",
            )
        exact = self._models.with_identity(held)
        if exact is not None:
            return exact
        other = self._models.choose(held.model)
        raise IdentityMismatch(
            f"context {context.context_id} cannot be used by the workers that are alive: "
            f"{held.difference(other.identity)}; create it again"
        )

    async def _tokenizer(self, params: GenerateParams, model: ModelInfo) -> Tokenizer | None:
        if params.stop_texts:
            return await self._models.tokenizer(model)
        return await self._models.tokenizer_or_none(model)

    async def _store_beginning(self, model: ModelInfo, prompt: Sequence[int]) -> _Base:
        """A context for the beginning of a long prompt; the rest becomes the question.

        What is stored already is used when the rest is short enough for a question; otherwise all
        but the end of the prompt is stored.
        """
        _PREFIX_QUERIES.add(len(prompt), model_name=model.model)
        hits = _PREFIX_HITS.bind(model_name=model.model)
        found = self._contexts.longest_prefix(model, prompt[:-1])
        if found is not None:
            known, stop = found
            if len(prompt) - stop <= self._config.inline_prompt_tokens:
                hits.add(stop)
                return _Base(known, stop, tuple(prompt[stop:]))
        cut = (len(prompt) - 1) // BOUNDARY_TOKENS * BOUNDARY_TOKENS
        record: ContextRecord | None = None
        stored_before = False
        with self._admission.storing():
            async with contextlib.aclosing(self._contexts.store(model, prompt[:cut])) as progress:
                async for each in progress:
                    record, stored_before = each.record, each.found
        if record is None:
            raise Internal("storing the prompt ended without a record")
        if stored_before:  # Its tokens were not known here, as after a rebuild from the nodes.
            hits.add(cut)
        return _Base(record, cut, tuple(prompt[cut:]))
