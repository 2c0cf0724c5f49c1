"""Runs what the flags of `longreach search-patterns` ask for.

The calibration prompt is InfiniteBench's key-value retrieval (one of many uuid pairs), as in
MInference 1.0, made at an exact length with the model's own tokenizer.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.report import commit, machine
from evaluation.encoding import Encoder, load_encoder
from evaluation.tasks import TASKS, Spec
from gpu_worker.model import load_model
from gpu_worker.pattern_search import SearchConfig, search
from gpu_worker.pattern_search.search import search_steps
from gpu_worker.patterns.spec import PATTERNS_FILE
from longreach.errors import InvalidRequest
from longreach.logging import configure

TASK = "kv_retrieval"
GPU_TOKENS = 30_000
"""The published length."""
CPU_TOKENS = 8192


def calibration_prompt(encoder: Encoder, tokens: int, seed: int) -> tuple[int, ...]:
    """A key-value retrieval prompt of exactly `tokens` tokens, question included.

    Raises InvalidRequest when that is too short for one pair.
    """
    room = TASKS[TASK].samples(Spec(4096, seed, seed, encoder))[0].answer_tokens
    sample = TASKS[TASK].samples(Spec(tokens + room, seed, seed, encoder))[0]
    return (*sample.context_ids, *sample.question_ids)


def run(given: argparse.Namespace) -> int:
    """Searches and writes the file; returns the exit status."""
    configure()
    output = output_path(given.model, given.output)
    model = load_model(given.model, given.device, given.dtype)
    tokens = given.tokens or (GPU_TOKENS if model.device.type == "cuda" else CPU_TOKENS)
    prompt = calibration_prompt(load_encoder(given.model), tokens, given.seed)
    config = SearchConfig(given.chunk_rows, given.chunks, given.repeats, given.tolerance)
    console = Console(stderr=True, highlight=False)
    started = time.monotonic()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        bar = progress.add_task("", total=search_steps(model.layers))

        def stage(done: int, text: str) -> None:
            progress.update(bar, completed=done, description=text)

        recorded = _recorded(len(prompt), given.seed)
        document = search(model, prompt, output, config, recorded, stage)
    console.print(f"{output}: {_summary(document)} in {time.monotonic() - started:.0f} s")
    print(output)
    return 0


def output_path(model: str, output: Path | None) -> Path:
    """Where the file goes: into the model's directory unless another place is named.

    Raises InvalidRequest for a model of the hub, which has no directory of its own.
    """
    if output is not None:
        return output
    if not Path(model).is_dir():
        raise InvalidRequest(
            f"{model!r} is not a directory, so there is no place for its {PATTERNS_FILE}; "
            "name one with --output"
        )
    return Path(model) / PATTERNS_FILE


def _recorded(tokens: int, seed: int) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "calibration": {"task": TASK, "tokens": tokens, "seed": seed},
        "machine": machine() | {"gpu": gpu, "threads": torch.get_num_threads()},
        "commit": commit(),
        "command": shlex.join(["longreach", *sys.argv[1:]]),
    }


def _summary(document: dict[str, Any]) -> str:
    heads: Sequence[dict[str, Any]] = [
        head for layer in document["layers"] if layer is not None for head in layer
    ]
    counts = Counter(str(head["pattern"]) for head in heads)
    return f"{len(heads)} heads, " + ", ".join(f"{n} {name}" for name, n in counts.most_common())
