"""What every benchmark prints and writes: where it ran, what it measured, which targets it met.

The JSON has `benchmark`, `quick`, `machine`, `commit`, `config`, `results` (rows), `targets` (name,
target, measured, unit, met, note) and `skipped` (what, why). Benchmarks report medians and ratios,
and run ours and its peers interleaved in one process run, so that a noisy machine disturbs both.
A quick run ends within 50 seconds and is for checking that the benchmark works.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_FILE_WIDTH = 160
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Target:
    """A figure to reach: `target` is its limit as text, for example "<= 10"."""

    name: str
    target: str
    measured: float
    unit: str
    met: bool
    note: str = ""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A measurement that was not made, and why."""

    what: str
    why: str


@dataclass
class Report:
    """Collects one benchmark's results; `config` says what was measured and how."""

    benchmark: str
    config: Mapping[str, Any]
    quick: bool = False
    results: list[dict[str, Any]] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    _ticks: tuple[int, int] = field(default_factory=lambda: cpu_ticks())

    def add(self, **row: Any) -> None:
        """One row of results; units last in the names."""
        self.results.append(row)

    def at_most(self, name: str, limit: float, measured: float, unit: str, note: str = "") -> None:
        """A target that is met when `measured` <= `limit`."""
        self.targets.append(Target(name, f"<= {limit:g}", measured, unit, measured <= limit, note))

    def at_least(self, name: str, limit: float, measured: float, unit: str, note: str = "") -> None:
        """A target that is met when `measured` >= `limit`."""
        self.targets.append(Target(name, f">= {limit:g}", measured, unit, measured >= limit, note))

    def skip(self, what: str, why: str) -> None:
        """Says that something was not measured."""
        self.skipped.append(Skipped(what, why))

    def as_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return {
            "benchmark": self.benchmark,
            "quick": self.quick,
            "machine": machine() | {"cpu_steal_share": self._steal_share()},
            "commit": commit(),
            "config": dict(self.config),
            "results": self.results,
            "targets": [dataclasses.asdict(target) for target in self.targets],
            "skipped": [dataclasses.asdict(skipped) for skipped in self.skipped],
        }

    def _steal_share(self) -> float:
        """Share of the CPU time since the start that a hypervisor gave to others.

        Times taken under much of it say little about the code.
        """
        stolen, total = cpu_ticks()
        return (stolen - self._ticks[0]) / max(1, total - self._ticks[1])

    def finish(self, path: Path | None) -> None:
        """Prints the tables and writes the JSON, when a path is given."""
        print_report(self)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.as_json(), indent=1) + "\n")


def argument_parser(benchmark: str, description: str) -> argparse.ArgumentParser:
    """The flags that every benchmark has: --quick and --json."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{benchmark}")
    parser.description = description
    parser.add_argument("--quick", action="store_true", help="small sizes, ends within 50 s")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the report")
    return parser


def machine() -> dict[str, Any]:
    """The machine and the versions that figures depend on."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average_1min": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {
            name: _version(name)
            for name in ("numpy", "torch", "transformers", "grpcio", "protobuf")
        },
    }


def commit() -> str | None:
    """The commit that runs, with "+" when the tree has changes; None outside a checkout."""
    git = ["git", "-C", str(_ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changes else "")


def print_report(report: Report, console: Console | None = None) -> None:
    """Tables of results, targets and what was skipped."""
    console = console or Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    if report.results:
        console.print(_table(report.benchmark, report.results))
    if report.targets:
        rows = [
            {
                "target": target.name,
                "limit": f"{target.target} {target.unit}",
                "measured": target.measured,
                "met": "yes" if target.met else "NO",
                "note": target.note,
            }
            for target in report.targets
        ]
        console.print(_table("targets", rows))
    for skipped in report.skipped:
        console.print(f"skipped {skipped.what}: {skipped.why}", markup=False)


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title)
    for name in columns:
        numeric = all(isinstance(row.get(name, 0), int | float) for row in rows)
        table.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_cell(row.get(name, "")) for name in columns))
    return table


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def cpu_ticks() -> tuple[int, int]:
    """(stolen, all) CPU ticks of the machine since it started; zeros where the kernel is silent."""
    try:
        ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0, 0
    return ticks[7], sum(ticks)


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
