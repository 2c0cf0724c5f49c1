"""Runs every benchmark, writes their JSON, plots and a page of tables: `python -m benchmarks`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.plots import PLOTS

BENCHMARKS = (
    "rpc", "retrieval", "decode", "prefill", "prefill_accuracy", "prefill_shared",
    "prefill_offload", "telemetry", "gpu",
)  # fmt: skip

MOST_ROWS = 150
"""Rows of a report that the page shows; where there are more, pictures and targets say it."""


def run(name: str, output: Path, quick: bool) -> Path:
    """Runs one benchmark in a process of its own; returns where its JSON is."""
    path = output / f"{name}.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(path)]
    subprocess.run(command + (["--quick"] if quick else []), check=True)
    return path


def cell(value: Any) -> str:
    """A table cell: four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as a Markdown table with the columns of all of them."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(c, "")) for c in columns) + " |" for row in rows]
    return lines


def page(output: Path) -> str:
    """Every report in `output` as Markdown."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench` (`python -m benchmarks --output docs/benchmarks`); each section "
        "by the command it names. Times are medians; a target that was missed says so. Where a "
        "hypervisor took much of the CPU time, times are upper bounds and ratios hold better.",
    ]
    for name in BENCHMARKS:
        path = output / f"{name}.json"
        if not path.exists():
            continue
        report = json.loads(path.read_text())
        machine = report["machine"]
        quick = " --quick" if report["quick"] else ""
        lines += [
            "",
            f"## {name}",
            f"`python -m benchmarks.{name}{quick} --json PATH` at {report['commit']}, "
            f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_average_1min']:.2f} "
            f"at the end, {machine['cpu_steal_share']:.0%} of the CPU time stolen by the "
            f"hypervisor. Configuration: `{json.dumps(report['config'])}`",
            "",
        ]
        for picture in (f"{name}.png", f"{name}-growth.png"):
            if (output / picture).exists():
                lines += [f"![{name}]({picture})", ""]
        if len(report["results"]) <= MOST_ROWS:
            lines += table(report["results"])
        else:
            lines.append(f"The {len(report['results'])} rows are in [{path.name}]({path.name}).")
        if report["targets"]:
            lines += ["", *table(report["targets"])]
        for skipped in report["skipped"]:
            lines += ["", f"Skipped {skipped['what']}: {skipped['why']}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--quick", action="store_true", help="quick runs, about 50 s each")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--no-run", action="store_true", help="draw what is there already")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        if not arguments.no_run:
            run(name, arguments.output, arguments.quick)
        path = arguments.output / f"{name}.json"
        if name in PLOTS and path.exists():
            PLOTS[name](json.loads(path.read_text()), arguments.output / f"{name}.png")
    (arguments.output / "README.md").write_text(page(arguments.output))


if __name__ == "__main__":
    main()
