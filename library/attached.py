"""`attach`: decode and prefill methods on an unchanged transformers model, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from gpu_worker.arrays import dtype_name
from gpu_worker.conformance import TOLERANCE
from gpu_worker.geometry import check_causal, check_supported, layer_geometries, refuse, text_config
from gpu_worker.patterns.spec import parse_pattern
from gpu_worker.prefill import decoder_layers
from library.attention import ATTACHED_NAME
from library.cache import adopt
from library.decode import DecodeMethod, parse_decode
from library.decode.retrieval import Retrieval
from library.sequence import Methods
from longreach.errors import InvalidRequest
from longreach.types import LayerGeometry, WorkFigures

_CHECKED_PARTS = (150, 1, 1, 20, 1)
"""Tokens of the passes of the check at attachment: a prompt, decode steps, a second turn."""


def attach(
    model: Any,
    decode: str | DecodeMethod = "auto:top_k=100",
    prefill: str = "dense",
    *,
    check: bool = True,
) -> Attached:
    """Makes a transformers causal language model attend by a decode and a prefill method.

    `decode` and `prefill` are written as in `library.decode.spec` and `gpu_worker.patterns.spec`.
    The model's weights, code and `generate` stay as they are: tokens fed several at a time are
    prompt and attend under the prefill method, tokens fed one at a time decode. `check` compares
    about 170 random tokens with the model's own attention first.

    Raises UnsupportedModel, with the reason, for a model that would not be exact; InvalidRequest
    for an unknown method or a model that is attached already.
    """
    method = parse_decode(decode) if isinstance(decode, str) else decode
    pattern = parse_pattern(prefill)
    name = type(model).__name__
    check_supported(type(model), model.config, name)
    check_causal(decoder_layers(model), name)
    if model.config._attn_implementation == ATTACHED_NAME:
        raise InvalidRequest(f"this {name} is attached already; detach it first")
    if dtype_name(model.dtype) not in {dtype_name(known) for known in TOLERANCE}:
        raise refuse(name, f"its dtype {model.dtype} is not float32, float16 or bfloat16")
    geometries = layer_geometries(model.config)
    if check:
        _require_same_logits(model, geometries, name)
    sparse = None if pattern.name == "dense" else pattern
    return Attached(model, geometries, Methods(method, sparse))


class Attached:
    """An attachment, and what was done under it; as a context manager it detaches at the end."""

    def __init__(self, model: Any, geometries: Sequence[LayerGeometry], methods: Methods) -> None:
        self._model = model
        self._geometries = tuple(geometries)
        self._methods = methods
        configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
        self._before = [(c, c._attn_implementation_internal) for c in configs.values()]
        model.set_attn_implementation(ATTACHED_NAME)
        self._hook = model.get_decoder().register_forward_pre_hook(
            self._before_forward, with_kwargs=True
        )

    @property
    def decode(self) -> DecodeMethod:
        """The decode method with its parameters."""
        return self._methods.decode

    @property
    def work(self) -> WorkFigures:
        """Work of the decode steps since attachment or `reset`, over layers and sequences.

        Every earlier position counts as in scope.
        """
        return self._methods.work

    @property
    def prefill_density(self) -> float:
        """(row, key) pairs attended / visible in prompts, in layers of full attention."""
        return self._methods.pairs_attended / max(1, self._methods.pairs_visible)

    @property
    def index_kinds(self) -> frozenset[str]:
        """Index kinds that answered."""
        return frozenset(self._methods.kinds)

    def reset(self) -> None:
        """Sets the figures to zero."""
        self._methods.work = WorkFigures()
        self._methods.pairs_attended = self._methods.pairs_visible = 0
        self._methods.kinds.clear()

    def detach(self) -> None:
        """Gives the model its own attention back; caches made meanwhile stay usable."""
        self._hook.remove()
        for config, implementation in self._before:
            config._attn_implementation_internal = implementation

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def _before_forward(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hands the decoder a cache of ours, made from the caller's where there is one."""
        cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)
        if cache is None:
            cache = DynamicCache(config=module.config)
            kwargs = {**kwargs, "past_key_values": cache}
        adopt(cache, self._geometries, self._methods)
        return args, kwargs


def _require_same_logits(model: Any, geometries: Sequence[LayerGeometry], name: str) -> None:
    """Raises UnsupportedModel where exact retrieval gives other logits than the model itself."""
    vocabulary = int(text_config(model.config).vocab_size)
    drawn = torch.randint(
        vocabulary, (1, sum(_CHECKED_PARTS)), generator=torch.Generator().manual_seed(0)
    ).to(model.device)
    exact = Methods(Retrieval(index="flat", budget="exact", sink=8, window=40))
    want = _logits_in_parts(model, drawn)
    attached = Attached(model, geometries, exact)
    try:
        got = _logits_in_parts(model, drawn)
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise refuse(name, f"a forward pass failed ({error})") from error
    finally:
        attached.detach()
    distance = float((got - want).square().mean().sqrt() / want.std())
    limit = TOLERANCE[model.dtype]
    if not distance <= limit:
        raise refuse(
            name,
            f"its logits differ by {distance:.2g} standard deviations from its own attention; the "
            f"limit for {dtype_name(model.dtype)} is {limit}",
        )


def _logits_in_parts(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits [tokens, vocab] of tokens fed in parts behind each other."""
    cache = DynamicCache(config=text_config(model.config))
    with torch.inference_mode():
        logits = [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits[0]
            for part in ids.split(list(_CHECKED_PARTS), 1)
        ]
    return torch.cat(logits).float()
