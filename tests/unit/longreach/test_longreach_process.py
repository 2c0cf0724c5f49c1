"""A service process announces one line, logs to stderr and ends when it is told to."""

import os
import signal
import subprocess
import sys

import pytest

BLOCKING = """
from longreach import logging, process
import logging as std
logging.configure()
std.getLogger("example").info("a log line")
process.announce("127.0.0.1:7000")
process.wait_for_stop(exit_with_parent={exit_with_parent})
std.getLogger("example").info("stopped in order")
"""
ASYNCIO = BLOCKING.replace(
    "process.wait_for_stop(", "import asyncio; asyncio.run(process.wait_for_stop_async("
).replace("{exit_with_parent})", "{exit_with_parent}))")
BOUNDED_S = 20
programs = pytest.mark.parametrize("program", [BLOCKING, ASYNCIO], ids=["blocking", "asyncio"])


def start(program, exit_with_parent=False):
    code = program.replace("{exit_with_parent}", str(exit_with_parent))
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@programs
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_announces_one_line_and_stops_on_a_signal(program, number):
    process = start(program)
    assert process.stdout.readline() == "serving 127.0.0.1:7000\n"
    # The handlers are in place shortly after the line, SIGTERM's last; until then it would kill.
    while not caught_signals(process.pid) & (1 << (signal.SIGTERM - 1)):
        assert process.poll() is None
    process.send_signal(number)
    rest, logs = process.communicate(timeout=BOUNDED_S)
    assert process.returncode == 0
    assert rest == ""
    assert "INFO    example: a log line" in logs
    assert "stopped in order" in logs


def caught_signals(pid):
    """The mask of signals that a process has handlers for (proc(5), SigCgt)."""
    with open(f"/proc/{pid}/status") as status:
        line = next(line for line in status if line.startswith("SigCgt"))
    return int(line.split()[1], 16)


@programs
def test_a_service_ends_with_its_parent_when_asked(program, tmp_path):
    code = program.replace("{exit_with_parent}", "True")
    child = tmp_path / "child.py"
    child.write_text(code)
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, time\n"
            f"child = subprocess.Popen([sys.executable, {os.fspath(child)!r}])\n"
            "time.sleep(1000)",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert parent.stdout.readline() == "serving 127.0.0.1:7000\n"
    parent.kill()
    # The pipes close when the last process that holds them, the child, has ended.
    _, logs = parent.communicate(timeout=BOUNDED_S)
    assert "stopped in order" in logs


def test_the_log_level_comes_from_the_environment(monkeypatch, capsys):
    import logging

    from longreach.logging import configure

    root = logging.getLogger()
    before = root.handlers[:], root.level
    root.handlers[:] = []
    try:
        monkeypatch.setenv("LONGREACH_LOG_LEVEL", "error")
        configure()
        logging.getLogger("example").warning("quiet")
        logging.getLogger("example").error("loud")
    finally:
        root.handlers[:], level = before
        root.setLevel(level)
    captured = capsys.readouterr()
    assert "loud" in captured.err
    assert "quiet" not in captured.err
    assert captured.out == ""
