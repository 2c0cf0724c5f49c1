"""What a node is told and what it tells about itself."""

from __future__ import annotations

import dataclasses
import os
import socket

import pytest

from longreach.config import read_config
from longreach.errors import InvalidRequest
from longreach.types import NodeStats, WorkFigures
from retrieval_node.config import NodeConfig
from retrieval_node.membership import node_reports

STATS = NodeStats(1, 2, 3, 4, 5, 6, 7, WorkFigures(), "scalar")


def config(*flags: str, **environ: str) -> NodeConfig:
    return read_config(NodeConfig, "node", flags, {"LONGREACH_CLUSTER_SECRET": "s", **environ})


def test_flags_win_over_the_environment_and_sizes_have_units():
    read = config(
        "--memory-limit-bytes",
        "2GiB",
        "--coordinators",
        "a:1, b:2,",
        LONGREACH_MEMORY_LIMIT_BYTES="1GiB",
        LONGREACH_ZONE="z1",
    )
    assert read.memory_limit == 2 << 30
    assert read.coordinator_addresses == ("a:1", "b:2")
    assert read.zone == "z1"


def test_without_a_limit_a_share_of_the_memory_is_used():
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < config().memory_limit < machine


def test_help_shows_every_setting_with_its_prose(capsys):
    with pytest.raises(SystemExit) as ended:
        config("--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(NodeConfig):
        assert "--" + field.name.replace("_", "-") in shown
        assert " ".join(field.metadata["help"].split()) in " ".join(shown.split())


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--cluster-secret", ""), "LONGREACH_CLUSTER_SECRET"),
        (("--build-threads", "0"), "build_threads is 0"),
        (("--max-streams", "0"), "max_streams is 0"),
        (("--memory-limit-bytes", "lots"), "512MiB"),
    ],
)
def test_a_wrong_setting_is_named(flags, named):
    with pytest.raises(InvalidRequest, match=named):
        config(*flags)


def test_reports_name_the_node_and_one_life_of_its_process():
    read = config("--node-id", "n1", "--host", "h", "--zone", "z", "--advertise", "n1.nodes:7000")
    report = node_reports(read, "0.0.0.0:7000", lambda: STATS)
    first, second = report(), report()
    assert (first.member_id, first.address, first.host, first.zone) == (
        "n1",
        "n1.nodes:7000",
        "h",
        "z",
    )
    assert first.node == STATS
    assert first.worker is None
    assert first.incarnation == second.incarnation
    assert node_reports(read, "0.0.0.0:7000", lambda: STATS)().incarnation != first.incarnation


def test_a_node_without_a_name_is_known_by_its_host_and_port():
    report = node_reports(config("--host", "h"), "127.0.0.1:7000", lambda: STATS)
    assert report().member_id == "h:7000"
    assert report().address == "127.0.0.1:7000"


def test_a_wildcard_address_is_reported_with_the_machine_s_name():
    report = node_reports(config(), "0.0.0.0:7000", lambda: STATS)
    assert report().address == f"{socket.gethostname()}:7000"
