"""Processes of a local cluster, played by small scripts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longreach.errors import InvalidRequest, Unavailable
from longreach.local_cluster import LocalCluster, MemberProcess

_SERVE = """
import sys, time
listen = sys.argv[sys.argv.index("--listen") + 1]
print("noise", flush=True)
print("serving", "127.0.0.1:4242" if listen.endswith(":0") else listen, flush=True)
time.sleep(60)
"""

_IGNORE_SIGTERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + _SERVE

_FAIL = """
import sys
print("no cluster secret; set LONGREACH_CLUSTER_SECRET", file=sys.stderr)
sys.exit(9)
"""

MakeMember = Callable[[str], MemberProcess]


@pytest.fixture
def make_member(tmp_path: Path) -> Iterator[MakeMember]:
    made: list[MemberProcess] = []

    def make(script: str) -> MemberProcess:
        (tmp_path / "played_service.py").write_text(script)
        member = MemberProcess(
            name="node-0",
            package="played_service",
            flags={"--node-id": "node-0"},
            log_path=tmp_path / "node-0.log",
            environment={**os.environ, "PYTHONPATH": str(tmp_path)},
        )
        made.append(member)
        return member

    yield make
    for member in made:
        if member.alive:
            member.kill()


def _soon() -> float:
    return time.monotonic() + 20


def test_a_member_is_known_by_the_address_it_announces(make_member: MakeMember) -> None:
    member = make_member(_SERVE)
    member.start()
    assert member.wait_announced(_soon()) == "127.0.0.1:4242"
    assert member.alive
    assert member.stop() == -signal.SIGTERM
    assert not member.alive


def test_a_restarted_member_listens_where_it_did(make_member: MakeMember) -> None:
    member = make_member(_SERVE)
    member.address = "127.0.0.1:5555"
    member.start()
    assert member.wait_announced(_soon()) == "127.0.0.1:5555"
    member.kill()
    member.start()
    assert member.wait_announced(_soon()) == "127.0.0.1:5555"


def test_a_member_that_dies_at_start_shows_the_end_of_its_log(make_member: MakeMember) -> None:
    member = make_member(_FAIL)
    member.log_path.write_text("a line of an earlier run\n")
    member.start()
    with pytest.raises(Unavailable, match=r"node-0 exited with status 9") as caught:
        member.wait_announced(_soon())
    assert caught.value.message.endswith("\n    no cluster secret; set LONGREACH_CLUSTER_SECRET")
    assert "earlier run" not in caught.value.message


def test_a_member_that_says_nothing_is_not_waited_for_forever(make_member: MakeMember) -> None:
    member = make_member("import time; time.sleep(60)")
    member.start()
    with pytest.raises(Unavailable, match="did not start serving in time"):
        member.wait_announced(time.monotonic() + 0.3)


def test_a_member_that_ignores_sigterm_is_killed_after_its_grace(make_member: MakeMember) -> None:
    member = make_member(_IGNORE_SIGTERM)
    member.start()
    member.wait_announced(_soon())
    assert member.stop(grace_s=0.3) == -signal.SIGKILL


def test_a_member_that_was_not_started_says_so(make_member: MakeMember) -> None:
    with pytest.raises(Unavailable, match="node-0 was not started"):
        _ = make_member(_SERVE).pid


def test_the_members_of_a_cluster_are_named_and_keep_their_secret(tmp_path: Path) -> None:
    cluster = LocalCluster("some/model", nodes=2, workers=1, data_dir=tmp_path)
    names = [member.name for member in cluster.members]
    assert names == ["coordinator", "worker-0", "node-0", "node-1"]
    secrets = {member.environment["LONGREACH_CLUSTER_SECRET"] for member in cluster.members}
    again = LocalCluster("some/model", data_dir=tmp_path)
    secrets.add(again.process("node-1").environment["LONGREACH_CLUSTER_SECRET"])
    assert len(secrets) == 1
    assert (tmp_path / "cluster-secret").stat().st_mode & 0o077 == 0
    with pytest.raises(InvalidRequest, match="this cluster has coordinator, worker-0"):
        cluster.process("node-7")


def test_flags_of_a_service_reach_its_members(tmp_path: Path) -> None:
    cluster = LocalCluster(
        "some/model", data_dir=tmp_path, node_flags={"index_kind": "flat", "build_threads": 2}
    )
    flags = cluster.process("node-1").flags
    assert flags["--index-kind"] == "flat"
    assert flags["--build-threads"] == "2"
    assert flags["--node-id"] == "node-1"
    assert "--index-kind" not in cluster.process("worker-0").flags


def test_a_cluster_needs_a_node_and_a_worker(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="0 nodes and 1 workers"):
        LocalCluster("some/model", nodes=0, data_dir=tmp_path)
