"""Choice of the instruction-set tier, and the thread pool's size."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from retrieval_node import kernel


def isa_with(forced: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from retrieval_node import kernel; print(kernel.isa())"],
        env={**os.environ, "LONGREACH_ISA": forced},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_best_supported_tier_is_the_default():
    assert isa_with("").stdout.strip() == kernel.supported_isas()[-1]


def test_the_environment_forces_a_tier():
    assert isa_with("scalar").stdout.strip() == "scalar"


def test_an_unknown_forced_tier_fails_at_import_and_names_the_known_ones():
    result = isa_with("avx9000")
    assert result.returncode != 0
    assert 'LONGREACH_ISA: unknown instruction set "avx9000"' in result.stderr
    assert "scalar" in result.stderr


def test_an_unknown_tier_is_refused():
    with pytest.raises(ValueError, match=r"unknown instruction set .* scalar"):
        kernel.set_isa("neon")


def test_the_pool_has_at_least_one_thread():
    before = kernel.threads()
    with pytest.raises(ValueError, match="threads is 0; it must be at least 1"):
        kernel.set_threads(0)
    assert kernel.threads() == before


def test_pinned_threads_still_do_the_work():
    import numpy as np

    before = kernel.threads()
    keys = np.ones((3, 8, 4), np.float32)
    rows = kernel.KernelRows(np.ones((2, 3, 1, 4), np.float32), 0, 0, 8)
    try:
        kernel.set_threads(3, pin=True)
        [part] = kernel.attend_exact(keys, keys, [rows], 1.0)
    finally:
        kernel.set_threads(before)
    np.testing.assert_allclose(part.output, 1.0, rtol=1e-6)
