"""Trains the demo model: `python -m models.train --out DIR --minutes M`.

One run, two single-threaded ranks by default (they beat two threads), 4,096 tokens a step
while sequences are short and then 8,192.
The run can be killed and started again with the same command: it continues from the last
checkpoint, and the minutes already spent count.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from models.optimizer import Muon
from models.primed import DemoConfig, DemoModel
from models.priming import prime
from models.sequences import Batch, TrainingText, make_batch
from models.tokenizer import build_tokenizer

CHECKPOINT_NAME = "checkpoint.pt"
LOG_NAME = "training.log"
TOKENIZER_NAME = "tokenizer.json"

_SUPERVISED_ROWS_MAX = 96
_WITHOUT_NEIGHBOURS_SHARE = 0.15
_MULTIPLICITY_MAX = 600.0
_NEIGHBOUR_MULTIPLICITY_MAX = 100.0


@dataclass(frozen=True)
class TrainSettings:
    """One run.

    out: directory for tokenizer, checkpoint and log. minutes: wall-clock length of the run. steps:
    if set, the length of the run instead of `minutes`, which makes it repeatable bit for bit.
    start_from: a checkpoint whose weights and optimiser state replace the primed initialisation.
    matrix_lr, other_lr: peak learning rates of Muon and of Adam. log_every: steps between lines of
    the log. checkpoint_seconds: time between checkpoints.
    """

    out: Path
    minutes: float = 38.0
    steps: int | None = None
    ranks: int = 2
    seed: int = 0
    start_from: Path | None = None
    matrix_lr: float = 0.012
    other_lr: float = 2e-3
    log_every: int = 50
    checkpoint_seconds: float = 60.0


@dataclass(frozen=True)
class Schedule:
    """What changes with `progress`, the share of the run that is done, 0 to 1."""

    progress: float

    @property
    def length(self) -> int:
        """Tokens per sequence: short first, while the copying circuit forms."""
        return 256 if self.progress < 0.3 else 512

    @property
    def sequences_per_rank(self) -> int:
        """2,048 tokens a rank at first, then 4,096: twice the distractors in the last layer."""
        return 8

    @property
    def copy_share(self) -> float:
        """Share of sequences that are pure copying."""
        return 0.12 if self.progress < 0.3 else 0.06

    @property
    def variable_boost(self) -> float:
        """How much more often variable tracking is drawn: its circuit is the last to form.

        It copies what stands before the match, not after it, and it forms only while nothing is
        diluted.
        """
        return 3.5 if self.progress < 0.3 else 1.5

    @property
    def multiplicity_max(self) -> float:
        """How many tokens a diluted token may stand for: 1, then a ramp up to 600."""
        ramp = min(1.0, max(0.0, (self.progress - 0.25) / 0.25))
        return math.exp(ramp * math.log(_MULTIPLICITY_MAX))

    @property
    def lr_factor(self) -> float:
        """Learning rate over its peak: a short warm-up, a plateau, then linear decay."""
        warm = min(1.0, 0.05 + self.progress / 0.02)
        return warm * min(1.0, max(0.02, (1 - self.progress) / 0.65))


class Trainer:
    """One rank's model, optimisers and counters."""

    def __init__(self, settings: TrainSettings, rank: int, text: TrainingText) -> None:
        self.settings = settings
        self.rank = rank
        self.text = text
        torch.manual_seed(settings.seed)
        self.model = DemoModel(DemoConfig())
        prime(self.model, seed=settings.seed + 1)
        named = list(self.model.named_parameters())
        matrices = [p for name, p in named if p.dim() == 2 and "embed" not in name]
        others = [p for name, p in named if p.dim() != 2 or "embed" in name]
        self.parameters = [p for _, p in named]
        self.muon = Muon(matrices)
        self.adam = torch.optim.Adam(others, lr=settings.other_lr, betas=(0.9, 0.98), eps=1e-10)
        self.step_count = 0
        self.token_count = 0
        self.seconds_before = 0.0
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of training so far, earlier starts included."""
        return self.seconds_before + time.monotonic() - self.started

    def progress(self) -> float:
        """Share of the run that is done; rank 0 decides, so that all ranks stop together."""
        if self.settings.steps is not None:
            return self.step_count / self.settings.steps
        share = torch.tensor([self.seconds / (60 * self.settings.minutes)], dtype=torch.float64)
        if dist.is_initialized():
            dist.broadcast(share, 0)
        return float(share.item())

    def step(self, schedule: Schedule) -> StepResult:
        """One optimiser step; its data depend on seed, rank and step number only."""
        rng = random.Random(f"{self.settings.seed}/{self.rank}/{self.step_count}")
        batch = make_batch(
            schedule.sequences_per_rank,
            schedule.length,
            rng,
            self.text,
            schedule.multiplicity_max,
            schedule.copy_share,
            schedule.variable_boost,
        )
        result = self._backward(batch, schedule, rng)
        self._average_gradients()
        self.muon.step(self.settings.matrix_lr * schedule.lr_factor)
        for group in self.adam.param_groups:
            group["lr"] = self.settings.other_lr * schedule.lr_factor
        self.adam.step()
        self.step_count += 1
        self.token_count += batch.ids.size * self.settings.ranks
        return result

    def _backward(self, batch: Batch, schedule: Schedule, rng: random.Random) -> StepResult:
        ids = torch.from_numpy(batch.ids)
        rows, valid = pick_supervised_rows(batch, rng)
        neighbour_max = min(schedule.multiplicity_max, _NEIGHBOUR_MULTIPLICITY_MAX)
        neighbour_bias = torch.tensor([rng.random() * math.log(neighbour_max) for _ in batch.tasks])
        if rng.random() < _WITHOUT_NEIGHBOURS_SHARE:
            neighbour_bias.fill_(-math.inf)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model.forward_supervised(
                ids,
                torch.from_numpy(batch.positions),
                torch.from_numpy(batch.dilution),
                rows,
                neighbour_bias,
            )
            logits = self.model.logits(hidden[valid])
        targets = ids.gather(1, rows + 1)[valid]
        loss = F.cross_entropy(logits.float(), targets)
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        right = (logits.argmax(-1) == targets).tolist()
        tasks = [batch.tasks[row] for row in valid.nonzero()[:, 0].tolist()]
        return StepResult(loss.item(), list(zip(tasks, right, strict=True)))

    def _average_gradients(self) -> None:
        if not dist.is_initialized():
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        pieces = flat.split([p.numel() for p in self.parameters])
        for parameter, piece in zip(self.parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)

    def save(self, path: Path) -> None:
        """Writes everything a resumed run needs; the file is replaced in one step."""
        state: dict[str, Any] = {
            "config": self.model.config.as_dict(),
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "step": self.step_count,
            "tokens": self.token_count,
            "seconds": self.seconds,
            "seed": self.settings.seed,
            "torch_rng": torch.get_rng_state(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Continues from `save`'s file.

        Raises ValueError if the checkpoint was made with another seed.
        """
        state = torch.load(path, weights_only=True)
        if state["seed"] != self.settings.seed:
            raise ValueError(
                f"{path} was trained with seed {state['seed']}, not {self.settings.seed}; "
                "use the same seed or another --out"
            )
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.step_count = state["step"]
        self.token_count = state["tokens"]
        self.seconds_before = state["seconds"]
        torch.set_rng_state(state["torch_rng"])

    def restart_schedule(self) -> None:
        """Makes what was loaded the start of a new run: its steps and minutes count from zero."""
        self.step_count = self.token_count = 0
        self.seconds_before = 0.0


@dataclass(frozen=True)
class StepResult:
    """Loss of a step and, per supervised token, its task and whether the argmax was right."""

    loss: float
    answers: list[tuple[str, bool]]


def pick_supervised_rows(batch: Batch, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Tokens to predict from: int64 rows [B, R] and which of them are real, bool [B, R].

    Row t predicts token t + 1. A sequence with more than 96 targets gives a random 96 of them.
    """
    chosen: list[list[int]] = []
    for marks in batch.supervised:
        targets = [int(index) - 1 for index in marks.nonzero()[0]]
        if len(targets) > _SUPERVISED_ROWS_MAX:
            targets = sorted(rng.sample(targets, _SUPERVISED_ROWS_MAX))
        chosen.append(targets)
    width = max(len(targets) for targets in chosen)
    rows = torch.zeros(len(chosen), width, dtype=torch.long)
    valid = torch.zeros(len(chosen), width, dtype=torch.bool)
    for index, targets in enumerate(chosen):
        rows[index, : len(targets)] = torch.tensor(targets, dtype=torch.long)
        valid[index, : len(targets)] = True
    return rows, valid


class ProgressLog:
    """Averages step results and prints a line with the time left now and then."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reset()

    def _reset(self) -> None:
        self._losses: list[float] = []
        self._answers: dict[str, list[bool]] = defaultdict(list)

    def add(self, result: StepResult) -> None:
        """Counts one step."""
        self._losses.append(result.loss)
        for task, right in result.answers:
            self._answers[task].append(right)

    def write(self, trainer: Trainer, schedule: Schedule) -> None:
        """Writes a line on what was added since the last one."""
        left = trainer.seconds * (1 / max(schedule.progress, 1e-6) - 1)
        tasks = " ".join(
            f"{task}={sum(answers) / len(answers):.3f}"
            for task, answers in sorted(self._answers.items())
        )
        line = (
            f"{trainer.seconds / 60:5.1f} min  {schedule.progress:4.0%}  left {left / 60:4.1f} min"
            f"  step {trainer.step_count}  T {schedule.length}"
            f"  x{schedule.multiplicity_max:.0f}  lr {schedule.lr_factor:.2f}"
            f"  loss {sum(self._losses) / len(self._losses):.3f}  token accuracy: {tasks}"
        )
        self.note(line)
        self._reset()

    def note(self, line: str) -> None:
        """Writes a line to the log and to standard output."""
        print(line, flush=True)
        with self._path.open("a", encoding="utf-8") as log:
            log.write(line + "\n")


def run_rank(rank: int, settings: TrainSettings, rendezvous: str) -> None:
    """One rank's whole run; rank 0 writes the log and the checkpoints."""
    torch.set_num_threads(1)
    if settings.ranks > 1:
        dist.init_process_group(
            "gloo", init_method=rendezvous, rank=rank, world_size=settings.ranks
        )
    text = TrainingText(Tokenizer.from_file(str(settings.out / TOKENIZER_NAME)))
    trainer = Trainer(settings, rank, text)
    checkpoint = settings.out / CHECKPOINT_NAME
    log = ProgressLog(settings.out / LOG_NAME)
    if checkpoint.exists():
        trainer.load(checkpoint)
    elif settings.start_from is not None:
        trainer.load(settings.start_from)
        trainer.restart_schedule()
    trainer.started = time.monotonic()
    if rank == 0:
        weights = sum(p.numel() for p in trainer.parameters)
        log.note(
            f"start at step {trainer.step_count}: {weights:,} weights, {settings.ranks} ranks, "
            f"{settings.minutes:g} minutes, seed {settings.seed}, "
            f"{len(text.filler):,} tokens of filler, {len(text.words)} single-token words"
        )
    saved = time.monotonic()
    while (progress := trainer.progress()) < 1:
        schedule = Schedule(progress)
        result = trainer.step(schedule)
        if rank != 0:
            continue
        log.add(result)
        if trainer.step_count % settings.log_every == 0:
            log.write(trainer, schedule)
        if time.monotonic() - saved > settings.checkpoint_seconds:
            trainer.save(checkpoint)
            saved = time.monotonic()
    if rank == 0:
        trainer.save(checkpoint)
        log.note(
            f"done: {trainer.step_count} steps, {trainer.token_count:,} tokens, "
            f"{trainer.seconds / 60:.1f} min"
        )
    if dist.is_initialized():
        dist.destroy_process_group()


def train(settings: TrainSettings) -> None:
    """Runs all ranks to the end, starting or continuing in `settings.out`."""
    settings.out.mkdir(parents=True, exist_ok=True)
    tokenizer_path = settings.out / TOKENIZER_NAME
    if not tokenizer_path.exists():
        build_tokenizer().save(str(tokenizer_path))
    if settings.ranks == 1:
        run_rank(0, settings, "")
        return
    # Ranks are on this machine, and a file needs neither a free port nor a host name.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rendezvous = settings.out / f"rendezvous-{os.getpid()}"
    rendezvous.unlink(missing_ok=True)
    try:
        mp.spawn(
            run_rank,
            args=(settings, f"file://{rendezvous.resolve()}"),
            nprocs=settings.ranks,
        )
    finally:
        rendezvous.unlink(missing_ok=True)


def parse_arguments(arguments: Sequence[str] | None = None) -> TrainSettings:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m models.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "Then:  python -m models.export --run DIR --out models/demo\n"
            "and:   python -m models.evaluate --model models/demo --json evaluation.json\n\n"
            "DIR holds tokenizer.json, checkpoint.pt (model, optimisers, step, seconds) and\n"
            "training.log. In the log, xN is how many tokens a diluted token may stand for, and\n"
            "token accuracy is on training batches at that difficulty, so it falls while N rises."
        ),
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the run")
    parser.add_argument("--minutes", type=float, default=38.0, help="length of the run")
    parser.add_argument(
        "--steps", type=int, help="length in steps instead: a repeatable run, for tests"
    )
    parser.add_argument(
        "--ranks", type=int, default=2, help="single-threaded processes; one per free core"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--start-from", type=Path, help="a checkpoint.pt to begin with, not the primed weights"
    )
    given = parser.parse_args(arguments)
    return TrainSettings(
        out=given.out,
        minutes=given.minutes,
        steps=given.steps,
        ranks=given.ranks,
        seed=given.seed,
        start_from=given.start_from,
    )


if __name__ == "__main__":
    train(parse_arguments())
