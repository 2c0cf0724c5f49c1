"""One process of a deployment: started, paused, killed, restarted; never left behind.

Each has a log, a pid file while it runs, and the kernel's promise to die with the process that
started it, even while it is paused.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# Part of util-linux. Setting it between fork and exec would run Python code in the fork of a
# process with many threads.
_DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL", "--")
_POLL_S = 0.02
_LOG_TAIL_LINES = 15


class MemberExited(AssertionError):
    """A process ended that nobody ended, or did not come up."""


class MemberProcess:
    """A process under a name. `folder` takes its log and pid file, `directory` is where it runs.

    `announcement` is the part of a line of its output that says it serves; an address follows it.

    Start it from the main thread only: the promise above is tied to the thread that starts.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        directory: Path,
        environment: Mapping[str, str],
        announcement: str = "serving ",
    ) -> None:
        self.name = name
        self._directory = directory
        self.log_path = folder / "logs" / f"{name}.log"
        self.pid_path = folder / "pids" / f"{name}.pid"
        self.paused = False
        self._output_path = self.log_path.with_suffix(".out")
        self._environment = dict(environment)
        self._announcement = announcement
        self._process: subprocess.Popen[bytes] | None = None
        for path in (self.log_path, self.pid_path):
            path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def pid(self) -> int:
        """Process id of the current or the last life; 0 before the first."""
        return self._process.pid if self._process else 0

    @property
    def alive(self) -> bool:
        """Whether it runs, paused or not."""
        return self._process is not None and self._process.poll() is None

    def start(self, command: Sequence[str]) -> None:
        """Starts a life of the process."""
        assert not self.alive, f"{self.name} runs"
        self.paused = False
        with self._output_path.open("wb") as output, self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*_DIE_WITH_PARENT, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                env=self._environment,
                cwd=self._directory,
                start_new_session=True,  # Ctrl-C is the starter's to handle.
            )
        self.pid_path.write_text(f"{self._process.pid}\n")

    def announced(self) -> str:
        """What follows the announcement, such as host:port; empty so far. Raises MemberExited."""
        for line in self._output_path.read_text(errors="replace").splitlines(keepends=True):
            if self._announcement in line and line.endswith("\n"):
                return line.partition(self._announcement)[2].strip() or "ready"
        if not self.alive:
            raise MemberExited(f"{self.name} ended while it started; {self.log_tail()}")
        return ""

    def wait_announced(self, timeout_s: float) -> str:
        """Waits for the announcement. Raises MemberExited."""
        deadline = time.monotonic() + timeout_s
        while not (said := self.announced()):
            if time.monotonic() > deadline:
                raise MemberExited(f"{self.name} is not up in {timeout_s} s; {self.log_tail()}")
            time.sleep(_POLL_S)
        return said

    def pause(self) -> None:
        """Freezes it (SIGSTOP): its connections stay open, it answers nothing."""
        self._signal(signal.SIGSTOP)
        self.paused = True

    def resume(self) -> None:
        """Lets it go on (SIGCONT)."""
        self._signal(signal.SIGCONT)
        self.paused = False

    def kill(self) -> None:
        """Ends it at once (SIGKILL), paused or not."""
        self._signal(signal.SIGKILL)
        self._ended()

    def terminate(self) -> None:
        """Asks it to stop (SIGTERM); `wait_ended` tells when it has."""
        self._signal(signal.SIGTERM)

    def wait_ended(self, timeout_s: float) -> bool:
        """Waits until it has ended; False when it still runs after `timeout_s`."""
        if self._process is None:
            return True
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        self._ended()
        return True

    def log_tail(self) -> str:
        """The last lines of its log."""
        lines = self.log_path.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        return f"the end of {self.log_path}:\n" + "\n".join(f"    {line}" for line in lines)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self.alive:
            self._process.send_signal(number)

    def _ended(self) -> None:
        if self._process is not None:
            self._process.wait()
        self.paused = False
        with contextlib.suppress(FileNotFoundError):
            self.pid_path.unlink()


def running_under(folder: Path) -> dict[int, str]:
    """Command lines of all processes that mention `folder`, this one excepted, by process id."""
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if f"{folder}/" in line:
                found[int(entry.name)] = line
    return found
