"""Prometheus' own checker."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from tests.deploy.promql import ROOT


def need(program: str) -> None:
    """Skips where Prometheus is not installed; CI installs it, and fails there."""
    if shutil.which(program) is None:
        assert not os.environ.get("CI"), f"CI installs {program} (.ci/run)"
        pytest.skip(f"{program} is not installed (Debian: apt-get install prometheus)")


def promtool(*arguments: str) -> str:
    """What promtool prints; fails where it finds something."""
    need("promtool")
    done = subprocess.run(
        ["promtool", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
