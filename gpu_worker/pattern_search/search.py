"""The search over all layers of a model."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpu_worker.model import Model
from gpu_worker.pattern_search.capture import LayerTensors, visit_layers
from gpu_worker.pattern_search.document import SearchState, write_json
from gpu_worker.pattern_search.measuring import LayerMeter
from gpu_worker.pattern_search.sizing import Sized, size_to_cost
from gpu_worker.pattern_search.space import SPACE, TARGET, space_scale
from gpu_worker.patterns.head_choices import FORMAT, HeadChoice, model_shapes
from gpu_worker.patterns.per_head import per_head_layer
from longreach.errors import InvalidRequest
from longreach.types import LayerGeometry

log = logging.getLogger(__name__)

Stage = Callable[[int, str], None]
"""Told how many steps are done, of `search_steps`, and what is being done now."""


@dataclass(frozen=True, slots=True)
class SearchConfig:
    """How to measure. `chunks` chunks of `chunk_rows` query rows, spread over the prompt, are
    attended each time; a cost is the least of `repeats` runs, interleaved with the target's;
    `tolerance`: how far from the target's a candidate's cost may be."""

    chunk_rows: int = 2048
    chunks: int = 4
    repeats: int = 2
    tolerance: float = 0.1


def searched_layers(layers: Sequence[LayerGeometry]) -> list[int]:
    """Layers of full attention."""
    return [number for number, each in enumerate(layers) if not each.sliding_window]


def search_steps(layers: Sequence[LayerGeometry]) -> int:
    """Steps that `Stage` counts: one for each candidate of each layer."""
    return len(searched_layers(layers)) * len(SPACE)


def search(
    model: Model,
    token_ids: Sequence[int],
    output: Path,
    config: SearchConfig,
    recorded: Mapping[str, Any],
    stage: Stage = lambda done, text: None,
) -> dict[str, Any]:
    """Searches every layer over the calibration prompt and writes the patterns file.

    A search that was stopped goes on after the last layer it finished, when model, prompt and
    config are the same. `recorded` (machine, calibration) is written into the file as it is.
    Raises InvalidRequest when the prompt is too short to leave anything out, or too long.
    """
    _check_length(model, len(token_ids))
    state = SearchState(output, _inputs(model, token_ids, config))
    if state.layers:
        log.info("going on after %d finished layers", len(state.layers))

    def visit(tensors: LayerTensors) -> None:
        done = len(state.layers) * len(SPACE)
        if tensors.layer not in state.layers:
            report = lambda step, text: stage(done + step, text)  # noqa: E731
            state.add(tensors.layer, search_layer(tensors, config, report))
        stage(len(state.layers) * len(SPACE), f"layer {tensors.layer} done")

    stage(len(state.layers) * len(SPACE), "dense prefill")
    visit_layers(model, token_ids, visit)
    document = _document(model, len(token_ids), config, recorded, state.layers)
    write_json(output, document)
    state.remove()
    return document


def search_layer(
    tensors: LayerTensors, config: SearchConfig, stage: Stage = lambda done, text: None
) -> dict[str, Any]:
    """One layer: candidates at the target's cost, each head's errors, and the least as its choice.

    A candidate that cannot be made as cheap as the target is measured but serves no head.
    """
    meter = LayerMeter(tensors, config.chunk_rows, config.chunks)
    q_heads, kv_heads = tensors.q.shape[0], tensors.k.shape[0]
    scale = space_scale(tensors.tokens)
    target = per_head_layer([TARGET.scaled(scale)] * q_heads, kv_heads)
    meter.run(target)  # Kernels are compiled and buffers taken before anything is timed.

    def cost_ratio(choice: HeadChoice) -> float:
        pattern = per_head_layer([choice] * q_heads, kv_heads)
        if choice == TARGET.scaled(scale):
            return 1.0
        pairs = [
            (meter.run(pattern).seconds, meter.run(target).seconds) for _ in range(config.repeats)
        ]
        return min(ours for ours, _ in pairs) / min(theirs for _, theirs in pairs)

    dense = meter.dense()
    rows = []
    for step, candidate in enumerate(SPACE):
        stage(step, f"layer {tensors.layer}: {candidate.name}")
        sized = size_to_cost(candidate, scale, tensors.tokens, config.tolerance, cost_ratio)
        pattern = per_head_layer([sized.choice] * q_heads, kv_heads)
        cost, errors = meter.errors(pattern, dense)
        rows.append({**_described(sized), **dataclasses.asdict(cost), "errors": errors})
    return {"candidates": rows, "heads": _choose(rows, q_heads)}


def _described(sized: Sized) -> dict[str, Any]:
    return {
        "candidate": sized.candidate.name,
        "pattern": sized.choice.pattern,
        "parameters": dict(sized.choice.parameters),
        "factor": sized.factor,
        "cost_ratio": sized.cost_ratio,
        "fits": sized.fits,
    }


def _choose(rows: Sequence[Mapping[str, Any]], q_heads: int) -> list[dict[str, Any]]:
    """Each head's candidate of least error among those that fit; the earlier one where equal."""
    fitting = [row for row in rows if row["fits"]]
    chosen = []
    for head in range(q_heads):
        best = min(fitting, key=lambda row: float(row["errors"][head]))
        chosen.append(
            {
                "pattern": best["pattern"],
                "parameters": best["parameters"],
                "error": best["errors"][head],
            }
        )
    return chosen


def _check_length(model: Model, tokens: int) -> None:
    limit = model.info.max_positions
    if tokens > limit:
        raise InvalidRequest(
            f"the calibration prompt has {tokens} tokens; model {model.info.model!r} takes {limit}"
        )
    if tokens < 512:
        raise InvalidRequest(
            f"the calibration prompt has {tokens} tokens; at least 512 are needed for any pattern "
            "to leave something out"
        )


def _inputs(model: Model, token_ids: Sequence[int], config: SearchConfig) -> dict[str, Any]:
    """What must be the same for finished layers to count."""
    ids = np.asarray(token_ids, np.int64).tobytes()
    return {
        "revision": model.info.revision,
        "dtype": str(model.dtype),
        "device": str(model.device),
        "prompt": hashlib.blake2b(ids, digest_size=16).hexdigest(),
        "config": dataclasses.asdict(config),
        "space": [candidate.name for candidate in SPACE],
    }


def _document(
    model: Model,
    tokens: int,
    config: SearchConfig,
    recorded: Mapping[str, Any],
    layers: Mapping[int, Mapping[str, Any]],
) -> dict[str, Any]:
    info = model.info
    return {
        "format": FORMAT,
        "model": {
            "name": info.model,
            "revision": info.revision,
            "layers": [list(shape) for shape in model_shapes(info.layers)],
        },
        "layers": [layers[n]["heads"] if n in layers else None for n in range(len(info.layers))],
        "search": {
            **dataclasses.asdict(config),
            "tokens": tokens,
            "space_scale": space_scale(tokens),
            "target": TARGET.name,
            "device": str(model.device),
            "dtype": str(model.dtype),
            "candidates": {str(n): layers[n]["candidates"] for n in sorted(layers)},
        },
        **recorded,
    }
