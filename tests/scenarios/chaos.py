"""Random faults, one at a time, under steady load: `python -m tests.scenarios.chaos --help`.

Each fault lasts a moment, is lifted, and the next one waits until the cluster is whole again. Only
a worker, which takes long to start, may still be coming up then: there is one more of them than the
load needs. What is reported is what callers saw.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from longreach.errors import LongreachError
from longreach.security.peers import Role
from tests.scenarios.deployment import Size
from tests.scenarios.faults import FAULTS, sequence
from tests.scenarios.load import Outcome, SteadyLoad
from tests.scenarios.recovery import percentile, recovery_s
from tests.scenarios.stage import CLEAN_TIMEOUT_S, COPIES, Scene, wait_for
from tests.scenarios.verdict import Verdict

SIZE = Size(coordinators=2, workers=3, nodes=4)
STREAMS = 6
FAULT_S = 1.5
"""How long a fault lasts that does not end by itself."""
CALM_S = 5.0
"""Load before the first fault, to know the silences of a healthy cluster."""
_LEAST_S = 0.5
_WHOLE_TIMEOUT_S = 60.0
_POLL_S = 0.05


@dataclass(frozen=True)
class Injected:
    """A fault that was injected, time.monotonic seconds."""

    kind: str
    member: str
    at: float


class Chaos:
    """Injects faults into a scene under load."""

    def __init__(self, scene: Scene, load: SteadyLoad, seed: int) -> None:
        self._scene = scene
        self._deployment = scene.deployment
        self._load = load
        self._numbers = random.Random(seed)
        self._kinds = sequence(random.Random(seed))
        self.injected: list[Injected] = []

    def run(self, seconds: float) -> float:
        """Injects faults for so long; returns when the last one was over."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._inject(next(self._kinds))
        return time.monotonic()

    def _inject(self, kind: str) -> None:
        began = time.monotonic()
        member, lift = FAULTS[kind](self._deployment, self._numbers)
        self.injected.append(Injected(kind, member, began))
        print(f"  {kind}: {member}", flush=True)
        self._load.wait_progress(began, FAULT_S)
        time.sleep(max(0.0, began + FAULT_S - time.monotonic()))
        lift()
        lifted = time.monotonic()
        wait_for(self._ready, _WHOLE_TIMEOUT_S, self._scene.what_is_amiss)
        # Every stream goes on before the next fault, so that each has its own recovery.
        self._load.wait_progress(lifted, _WHOLE_TIMEOUT_S)
        time.sleep(max(0.0, lifted + _LEAST_S - time.monotonic()))

    def _ready(self) -> bool:
        """Whether one more fault is a single one."""
        deployment = self._deployment
        down = deployment.down()
        try:
            return (
                set(down) <= set(deployment.named(Role.WORKER))
                and len(down) <= 1
                and self._scene.copies() >= COPIES
                and self._scene.mapped()
            )
        except LongreachError:
            return False


def report(
    injected: Sequence[Injected], ended: float, load: SteadyLoad, calm_from: float, seed: int
) -> dict[str, Any]:
    """The figures of a run."""
    outcomes = load.outcomes()
    counts = Counter(outcome.verdict for outcome in outcomes)
    stamps = load.stamps()
    ends = [*(fault.at for fault in injected[1:]), ended]
    recoveries = [
        recovery_s(stamps, fault.at, end) for fault, end in zip(injected, ends, strict=True)
    ]
    minutes = (ended - injected[0].at) / 60
    return {
        "faults": len(injected),
        "faults_per_minute": round(len(injected) / minutes, 1),
        "requests": len(outcomes),
        "failed": counts[Verdict.FAILED],
        "wrong": counts[Verdict.WRONG] + counts[Verdict.FOREIGN],
        "foreign": counts[Verdict.FOREIGN],
        "near_ties": counts[Verdict.NEAR_TIE],
        "recovery_p50_s": round(percentile(recoveries, 0.5), 3),
        "recovery_p99_s": round(percentile(recoveries, 0.99), 3),
        "recovery_max_s": round(max(recoveries), 3),
        "silence_without_faults_max_s": round(recovery_s(stamps, calm_from, injected[0].at), 3),
        "kinds": _by_kind(injected, recoveries),
        "bad": [_described(o, injected) for o in outcomes if _is_bad(o)],
        "seed": seed,
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "processor": _processor(),
            # Others' work on the machine lengthens every recovery.
            "load_average": [round(load, 1) for load in os.getloadavg()],
            "python": platform.python_version(),
        },
        "commit": _commit(),
        "config": {
            **asdict(SIZE),
            "copies": COPIES,
            "streams": STREAMS,
            "fault_s": FAULT_S,
            "kinds": sorted(FAULTS),
        },
    }


def _by_kind(injected: Sequence[Injected], recoveries: Sequence[float]) -> dict[str, Any]:
    found: dict[str, list[float]] = {}
    for fault, recovery in zip(injected, recoveries, strict=True):
        found.setdefault(fault.kind, []).append(round(recovery, 3))
    return {
        kind: {"faults": len(values), "recovery_max_s": max(values)}
        for kind, values in sorted(found.items())
    }


def _is_bad(outcome: Outcome) -> bool:
    return outcome.verdict in (Verdict.FAILED, Verdict.WRONG, Verdict.FOREIGN)


def _described(outcome: Outcome, injected: Sequence[Injected]) -> dict[str, str]:
    """A request that was not served, with the fault that began last before its end."""
    before = [fault for fault in injected if fault.at <= outcome.ended]
    during = f"{before[-1].kind}: {before[-1].member}" if before else "no fault"
    return {"during": during, "what": str(outcome)}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str:
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return told.stdout.strip() or "unknown"


def run(minutes: float, seed: int, folder: Path) -> dict[str, Any]:
    """One run on a cluster of its own; returns the report."""
    print(f"starting {asdict(SIZE)} in {folder}", flush=True)
    with Scene(folder, SIZE) as scene:
        began = time.monotonic()
        with SteadyLoad(scene.client, scene.library, streams=STREAMS, seed=seed) as load:
            assert load.wait_anew(began, _WHOLE_TIMEOUT_S), "the load does not start"
            calm_from = time.monotonic()
            time.sleep(CALM_S)
            chaos = Chaos(scene, load, seed)
            ended = chaos.run(60 * minutes)
        scene.wait_whole()
        figures = report(chaos.injected, ended, load, calm_from, seed)
        figures["left_behind"] = _left_behind(scene)
    return figures


def _left_behind(scene: Scene) -> str:
    """Sessions, tails and processes that should be gone; empty when all are."""
    try:
        wait_for(scene.clean, CLEAN_TIMEOUT_S, scene.what_is_left)
    except AssertionError as error:
        return str(error)
    strays = scene.deployment.strays()
    return f"processes: {strays}" if strays else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs chaos; the exit status is 0 when every request was served rightly."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.scenarios.chaos",
        description="Random faults, one at a time, on a cluster of real processes under load.",
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to inject faults")
    parser.add_argument("--seed", type=int, default=7, help="of the faults and the load")
    parser.add_argument("--report", type=Path, default=Path("chaos-report.json"))
    parser.add_argument("--keep", action="store_true", help="keep the folder with the logs")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _leave)
    folder = Path(tempfile.mkdtemp(prefix="longreach-chaos-"))
    try:
        figures = run(arguments.minutes, arguments.seed, folder)
    except KeyboardInterrupt:
        print("interrupted; every process is ended", file=sys.stderr)
        return 130
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    text = json.dumps(figures, indent=2)
    arguments.report.write_text(text + "\n")
    print(text)
    return 1 if figures["failed"] or figures["wrong"] or figures["left_behind"] else 0


def _leave(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
