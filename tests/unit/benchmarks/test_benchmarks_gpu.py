"""The CUDA benchmark: its correctness part in Triton's interpreter, and what it says without a GPU.

The interpreter is chosen when Triton is first imported, so the checks run in a process of their
own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

SCRIPT = """
from dataclasses import replace
from benchmarks.gpu_correctness import *
kinds = ("vertical_slash", "adaptive", "per_head")
every = [replace(case, q_heads=2) for case in cases((80,), ("float32",))]
small = [case for case in every if case.pattern.startswith(kinds)]
for case in small:
    limit = TOLERANCES[case.dtype]
    assert check_pattern(case, "cpu", 330, 128) < limit, case.name
assert check_dense(small[0], "cpu", 300, 128) < limit
assert check_decode(small[0], "cpu", 300) < limit
print(len(small))
"""


def test_every_kind_of_check_passes_on_small_sizes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "3"


def test_the_cases_cover_what_is_promised() -> None:
    from benchmarks.gpu_correctness import DTYPES, GROUPS, HEAD_SIZES, cases

    every = list(cases())
    assert {case.head_dim for case in every} == set(HEAD_SIZES) >= {64, 128, 256}
    assert {case.dtype for case in every} == set(DTYPES) == {"bfloat16", "float16"}
    assert {(case.q_heads, case.kv_heads) for case in every} == set(GROUPS)
    assert {case.pattern.split(":")[0] for case in every} == {
        "a_shape", "vertical_slash", "block_sparse", "adaptive", "per_head",
    }  # fmt: skip


def test_without_a_gpu_it_says_that_nothing_was_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--json", str(path)])
    assert gpu.main() == 0
    report = json.loads(path.read_text())
    assert report["targets"] == report["results"] == []
    assert [each["what"] for each in report["skipped"]] == gpu.target_names()
    assert all("not run: this machine has no CUDA" in each["why"] for each in report["skipped"])
    assert "not run" in capsys.readouterr().out
