"""How much memory a node takes for itself: 80% of what its process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from retrieval_node import config
from retrieval_node.config import NodeConfig

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("version_2", "version_1", "usable"),
    [
        ("1048576000\n", None, 1_048_576_000),
        (None, "1048576000\n", 1_048_576_000),
        ("max\n", None, MACHINE),
        (None, "9223372036854771712\n", MACHINE),
        (None, None, MACHINE),
    ],
    ids=["v2 limit", "v1 limit", "v2 without limit", "v1 without limit", "no control groups"],
)
def test_the_limit_follows_the_control_group_of_either_version(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version_2: str | None,
    version_1: str | None,
    usable: int,
) -> None:
    paths = []
    for name, text in (("memory.max", version_2), ("memory.limit_in_bytes", version_1)):
        paths.append(str(tmp_path / name))
        if text is not None:
            (tmp_path / name).write_text(text)
    monkeypatch.setattr(config, "_CGROUP_LIMITS", tuple(paths))
    assert NodeConfig(cluster_secret="x").memory_limit == int(0.8 * usable)
    stated = NodeConfig(cluster_secret="x", memory_limit_bytes=5)
    assert stated.memory_limit == 5
