"""The command line over a real cluster: every command, and nothing left running afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longreach.local_cluster import LocalCluster

pytestmark = pytest.mark.cluster

_COMMAND = [sys.executable, "-m", "longreach.cli"]


def _run(*arguments: str, at: LocalCluster, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*_COMMAND, *arguments],
        env={**os.environ, **at.environment, "COLUMNS": "200"},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_document_is_stored_asked_shown_and_deleted(
    shared_cluster: LocalCluster, tmp_path: Path
) -> None:
    path = tmp_path / "book.txt"
    path.write_text("It was the best of times, it was the wörst of times. " * 15, encoding="utf-8")

    stored = _run("ingest", str(path), "--name", "book", at=shared_cluster)
    assert stored.returncode == 0, stored.stderr
    context_id = stored.stdout.strip()
    assert re.fullmatch("ctx-[0-9a-f]{32}", context_id)
    again = _run("ingest", "-", "--name", "book", at=shared_cluster, stdin=path.read_text("utf-8"))
    assert again.stdout == stored.stdout
    assert "found" in again.stderr

    asked = _run(
        "ask", "--context", "book", "--json", "--max-tokens", "5", "Which?", at=shared_cluster
    )
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)
    assert answer["usage"]["context_tokens"] == len(path.read_bytes())
    assert answer["usage"]["prompt_tokens"] == len("Which?")
    assert answer["coverage"] == 1.0
    streamed = _run("ask", "--context", "book", "--max-tokens", "5", "Which?", at=shared_cluster)
    assert streamed.stdout == answer["text"] + "\n"
    assert "scanned" in streamed.stderr

    shown = _run("contexts", "show", context_id, "--json", at=shared_cluster)
    assert json.loads(shown.stdout)["index_fraction"] == 1.0
    status = _run("status", at=shared_cluster)
    assert status.stdout.count("alive") == 3
    assert _run("contexts", "delete", "book", at=shared_cluster).returncode == 0
    gone = _run("ask", "--context", context_id, "Which?", at=shared_cluster)
    assert gone.returncode == 1
    assert "no context" in gone.stderr


@pytest.fixture
def up(tiny_model: Callable[[str], Path], tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`longreach up`, ready."""
    command = [*_COMMAND, "up", "--model", str(tiny_model("llama")), "--nodes", "1"]
    command += ["--data-dir", str(tmp_path), "--listen", "127.0.0.1:0"]
    # A shell that starts the tests in the background makes all its children ignore SIGINT.
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    yield process
    if process.poll() is None:
        process.terminate()
    process.wait(30)


def _members_once_ready(process: subprocess.Popen[str]) -> list[int]:
    assert process.stderr is not None
    told = ""
    for line in process.stderr:
        told += line
        if line.startswith("ready: "):
            break
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", told)]
    assert len(pids) == 3, told
    return pids


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(map(_running, pids)):
        assert time.monotonic() < deadline, f"still running: {list(filter(_running, pids))}"
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_stops_every_process_when_it_is_stopped(
    up: subprocess.Popen[str], number: signal.Signals
) -> None:
    pids = _members_once_ready(up)
    assert all(map(_running, pids))
    up.send_signal(number)
    up.wait(30)
    assert not any(map(_running, pids))


def test_members_do_not_outlive_an_up_that_was_killed(up: subprocess.Popen[str]) -> None:
    pids = _members_once_ready(up)
    up.kill()
    up.wait()
    _wait_gone(pids)
