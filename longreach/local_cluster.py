"""A whole cluster on this machine: a coordinator, workers and nodes as processes of their own.

    with LocalCluster("models/demo", nodes=2) as cluster:
        client = cluster.client()

Everything lives under `data_dir`: the coordinator's catalog, the nodes' snapshots, one log per
process, the cluster's secret and, with TLS, its certificates. A second cluster over the same
directory finds the contexts of the first. Nothing outlives the process that started it: members
exit with their parent.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from longreach.errors import InvalidRequest, LongreachError, Unavailable
from longreach.rpc.channels import sync_channel
from longreach.rpc.tls import ChannelTls
from longreach.sdk import Client
from longreach.security.authority import Authority, MemberFiles
from longreach.security.peers import PeerIdentity, Role
from longreach.security.tls import client_files

DEFAULT_DATA_DIR = Path(".longreach")

_ANNOUNCEMENT = "serving "
_SERVICE = "longreach.v1.GenerationService"
_POLL_S = 0.05
_LOG_TAIL_LINES = 20
_METRICS = re.compile(r"metrics at (http://[^\s\"]+)")
_SETTLE_S = 15.0
_CLIENT_ID = "local-client"
_WILDCARDS = ("", "0.0.0.0", "[::]", "::")


@dataclass
class MemberProcess:
    """One process of a local cluster.

    `name` is "coordinator", "worker-0", "node-0", ...; `flags` are its command line without
    `--listen`. A restarted member listens on the address it had.
    """

    name: str
    package: str
    flags: dict[str, str]
    log_path: Path
    # Holds the cluster's secret, so it is never printed.
    environment: Mapping[str, str] = field(repr=False)
    listen: str = "127.0.0.1:0"
    address: str = ""
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _log_start: int = field(default=0, repr=False)

    @property
    def pid(self) -> int:
        """Process id. Raises Unavailable before `start`."""
        return self._running().pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def metrics_url(self) -> str:
        """Where it serves metrics, by its log; empty where it does not."""
        found = _METRICS.findall(self._logged())
        return found[-1] if found else ""

    def start(self) -> None:
        """Starts the process; `wait_announced` tells when it listens."""
        command = [sys.executable, "-m", self.package, "--listen", self.address or self.listen]
        for flag, value in self.flags.items():
            command += [flag, value]
        with self._stdout_path.open("wb") as stdout, self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=log,
                env=dict(self.environment),
                # Ctrl-C reaches the starter only, which then stops its members in order.
                start_new_session=True,
            )

    def wait_announced(self, deadline: float) -> str:
        """Waits until the process says where it serves; returns host:port.

        Raises Unavailable with the end of its log if it exits, or says nothing until `deadline`
        (time.monotonic seconds).
        """
        while True:
            for line in self._stdout_path.read_text(errors="replace").splitlines(keepends=True):
                if line.startswith(_ANNOUNCEMENT) and line.endswith("\n"):
                    self.address = line.removeprefix(_ANNOUNCEMENT).strip()
                    return self.address
            self.require_alive()
            if time.monotonic() > deadline:
                raise Unavailable(f"{self.name} did not start serving in time; {self._log_tail()}")
            time.sleep(_POLL_S)

    def require_alive(self) -> None:
        """Raises Unavailable with the end of its log if the process has exited."""
        status = self._running().poll()
        if status is not None:
            raise Unavailable(
                f"{self.name} exited with status {status}; {self._log_tail()}",
                reason="MEMBER_EXITED",
            )

    def send_signal(self, number: int) -> None:
        """Sends a signal, if the process still runs."""
        if self.alive:
            self._running().send_signal(number)

    def kill(self) -> None:
        """Ends the process at once (SIGKILL) and waits until it is gone."""
        self.send_signal(signal.SIGKILL)
        self._running().wait()

    def stop(self, grace_s: float = 10.0) -> int:
        """Asks the process to stop (SIGTERM), kills it after `grace_s`; returns its exit status."""
        self.send_signal(signal.SIGTERM)
        try:
            return self._running().wait(grace_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._running().wait()

    @property
    def _stdout_path(self) -> Path:
        return self.log_path.with_suffix(".out")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise Unavailable(f"{self.name} was not started")
        return self._process

    def _logged(self) -> str:
        return self.log_path.read_bytes()[self._log_start :].decode(errors="replace")

    def _log_tail(self) -> str:
        """What the process logged since it started, at most its last lines."""
        lines = self._logged().splitlines()[-_LOG_TAIL_LINES:]
        return f"the end of {self.log_path}:\n" + "\n".join(f"    {line}" for line in lines)


class LocalCluster:
    """Starts and stops the processes of a cluster on loopback ports; a context manager.

    model: a directory or hub name that every worker loads. nodes, workers: how many of each.
    data_dir: kept between runs. listen: the coordinator's address, port 0 for a free one.
    node_flags, worker_flags, coordinator_flags: further service flags, by config field name.
    coordinators: how many; several share a catalog, named by the coordinator flag `catalog`, and
    the first listens at `listen`. tls: every connection by mutual TLS, certificates by an authority
    of the cluster's own. start_timeout_s: how long the members may take until the coordinators are
    ready.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        nodes: int = 2,
        workers: int = 1,
        coordinators: int = 1,
        data_dir: str | os.PathLike[str] = DEFAULT_DATA_DIR,
        listen: str = "127.0.0.1:0",
        node_flags: Mapping[str, object] | None = None,
        worker_flags: Mapping[str, object] | None = None,
        coordinator_flags: Mapping[str, object] | None = None,
        tls: bool = False,
        start_timeout_s: float = 120.0,
    ) -> None:
        if nodes < 1 or workers < 1 or coordinators < 1:
            raise InvalidRequest(
                f"a cluster of {coordinators} coordinators, {nodes} nodes and {workers} workers; "
                "it needs at least one of each"
            )
        self.data_dir = Path(data_dir).absolute()
        self._authority = _authority(self.data_dir / "tls") if tls else None
        self._model = os.fspath(model)
        self._start_timeout_s = start_timeout_s
        self._extra = {
            "retrieval_node": node_flags or {},
            "gpu_worker": worker_flags or {},
            "coordinator": coordinator_flags or {},
        }
        self._coordinators = [self._coordinator("coordinator", listen)]
        for index in range(1, coordinators):
            self._coordinators.append(self._coordinator(f"coordinator-{index}", "127.0.0.1:0"))
        self._members = {member.name: member for member in self._coordinators}
        for index in range(workers):
            member = self._worker(f"worker-{index}")
            self._members[member.name] = member
        for index in range(nodes):
            member = self._node(f"node-{index}")
            self._members[member.name] = member

    @property
    def address(self) -> str:
        """The first coordinator's host:port."""
        return self._members["coordinator"].address

    @property
    def environment(self) -> dict[str, str]:
        """What a `longreach` command needs to find this cluster, as environment variables."""
        files = self._client_files()
        tls = (
            {}
            if files is None
            else {
                "LONGREACH_TLS_CERT": str(files.certificate),
                "LONGREACH_TLS_KEY": str(files.key),
                "LONGREACH_TLS_CA": str(files.ca),
            }
        )
        return {"LONGREACH_ADDRESS": self.address, **tls}

    def client(self, coordinator: str = "coordinator", *, timeout_s: float | None = None) -> Client:
        """A client of a coordinator of this cluster, or of several, comma separated; close it."""
        address = ",".join(self.process(each).address for each in coordinator.split(","))
        files = self._client_files()
        if files is None:
            return Client(address, timeout_s=timeout_s)
        return Client(
            address,
            timeout_s=timeout_s,
            tls_cert=str(files.certificate),
            tls_key=str(files.key),
            tls_ca=str(files.ca),
        )

    @property
    def members(self) -> tuple[MemberProcess, ...]:
        """Coordinators, workers, nodes."""
        return tuple(self._members.values())

    def process(self, name: str) -> MemberProcess:
        """The member of that name. Raises InvalidRequest."""
        try:
            return self._members[name]
        except KeyError:
            raise InvalidRequest(
                f"no member {name!r}; this cluster has {', '.join(self._members)}"
            ) from None

    def start(self) -> LocalCluster:
        """Starts every member and waits until the coordinator is ready to serve.

        Raises Unavailable with the end of a member's log where one fails; what was started is
        stopped then.
        """
        deadline = time.monotonic() + self._start_timeout_s
        (self.data_dir / "logs").mkdir(parents=True, exist_ok=True)
        others = self.members[len(self._coordinators) :]
        try:
            self._launch(self._coordinators)
            addresses = [member.wait_announced(deadline) for member in self._coordinators]
            for member in others:
                member.flags["--coordinators"] = ",".join(addresses)
            self._launch(others)
            for member in others:
                member.wait_announced(deadline)
            self.wait_ready(deadline)
            self._wait_settled()
        except BaseException:
            self.stop()
            raise
        return self

    def restart(self, name: str, *, timeout_s: float = 60.0) -> MemberProcess:
        """Stops a member if it runs, starts it again at its address and waits until it serves."""
        member = self.process(name)
        if member.alive:
            member.stop()
        member.start()
        member.wait_announced(time.monotonic() + timeout_s)
        return member

    def wait_ready(self, deadline: float) -> None:
        """Waits until the coordinator is ready and every member has registered.

        `deadline` is in time.monotonic seconds. Raises Unavailable, also when a member exits.
        """
        while not self._is_ready():
            for member in self.members:
                member.require_alive()
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"the cluster was not ready after {self._start_timeout_s:g} s: "
                    f"{self._what_is_missing()}; see {self.data_dir / 'logs'}"
                )
            time.sleep(_POLL_S)

    def stop(self, grace_s: float = 10.0) -> None:
        """Stops every member: the coordinator first, so that it does not take this for failures."""
        for member in self.members:
            if member.alive:
                member.stop(grace_s)

    def __enter__(self) -> LocalCluster:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _is_ready(self) -> bool:
        return all(
            self._is_serving(member.address) and not self._absent(member.name)
            for member in self._coordinators
        )

    def _is_serving(self, address: str) -> bool:
        """Whether the coordinator there says that it can serve generations."""
        files = self._client_files()
        tls = None
        if files is not None:
            own = client_files(str(files.certificate), str(files.key), str(files.ca))
            tls = ChannelTls(own) if own else None
        with sync_channel(address, tls=tls) as channel:
            request = health_pb2.HealthCheckRequest(service=_SERVICE)
            try:
                reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
            except grpc.RpcError:
                return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def _wait_settled(self) -> None:
        """Gives the contexts of an earlier run a moment to be found on the nodes again.

        One that stays out of reach (its node is not part of this cluster) keeps no one waiting.
        """
        deadline = time.monotonic() + _SETTLE_S
        with self.client(timeout_s=5) as client:
            while any(each.state == "unavailable" for each in client.contexts.list()):
                if time.monotonic() > deadline:
                    return
                time.sleep(_POLL_S)

    def _absent(self, coordinator: str = "coordinator") -> list[str]:
        expected = {member.address for member in self.members[len(self._coordinators) :]}
        with self.client(coordinator, timeout_s=5) as client:
            alive = {each.address for each in client.status().members if each.state == "alive"}
        return sorted(expected - alive)

    def _what_is_missing(self) -> str:
        try:
            absent = self._absent()
        except LongreachError as error:
            return error.message
        names = [member.name for member in self.members if member.address in absent]
        return f"not registered: {', '.join(names)}" if names else "its health is not SERVING"

    @staticmethod
    def _launch(members: Sequence[MemberProcess]) -> None:
        for member in members:
            member.start()

    def _coordinator(self, name: str, listen: str) -> MemberProcess:
        coordinator_id = "coordinator-0" if name == "coordinator" else name
        own = {
            "data_dir": self.data_dir / name,
            "coordinator_id": coordinator_id,
            **self._tls_flags(Role.COORDINATOR, coordinator_id, listen),
        }
        return self._member(name, "coordinator", own, listen=listen)

    def _worker(self, name: str) -> MemberProcess:
        own = {"worker_id": name, "model": self._model, **self._tls_flags(Role.WORKER, name)}
        return self._member(name, "gpu_worker", own)

    def _node(self, name: str) -> MemberProcess:
        own = {
            "node_id": name,
            "snapshot_dir": self.data_dir / "snapshots" / name,
            **self._tls_flags(Role.NODE, name),
        }
        return self._member(name, "retrieval_node", own)

    def _tls_flags(self, role: Role, member_id: str, listen: str = "") -> dict[str, object]:
        """The member's certificate, issued anew, as flags; nothing without TLS."""
        if self._authority is None:
            return {}
        host = listen.rpartition(":")[0]
        hosts = [socket.gethostname(), *([host] if host not in _WILDCARDS else [])]
        files = self._authority.issue(PeerIdentity(role, member_id), hosts)
        return {"tls_cert": files.certificate, "tls_key": files.key, "tls_ca": files.ca}

    def _client_files(self) -> MemberFiles | None:
        if self._authority is None:
            return None
        files = self._authority.files(_CLIENT_ID)
        if not files.certificate.exists():
            self._authority.issue(PeerIdentity(Role.CLIENT, _CLIENT_ID))
        return files

    def _member(
        self, name: str, package: str, own: Mapping[str, object], listen: str = "127.0.0.1:0"
    ) -> MemberProcess:
        settings = {**own, "exit_with_parent": "true", **self._extra[package]}
        return MemberProcess(
            name=name,
            package=package,
            flags={"--" + key.replace("_", "-"): str(value) for key, value in settings.items()},
            log_path=self.data_dir / "logs" / f"{name}.log",
            environment={**os.environ, "LONGREACH_CLUSTER_SECRET": self._secret()},
            listen=listen,
        )

    def _secret(self) -> str:
        """The cluster's secret; kept, because stored contexts are salted with it."""
        path = self.data_dir / "cluster-secret"
        if not path.exists():
            self.data_dir.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
        return path.read_text()


def _authority(folder: Path) -> Authority:
    return Authority.open(folder) if (folder / "ca.key").exists() else Authority.create(folder)


def raise_on_sigterm() -> None:
    """Makes SIGTERM raise SystemExit, so that `with LocalCluster` stops its members on it."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
