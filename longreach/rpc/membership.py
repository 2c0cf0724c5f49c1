"""Heartbeats: how workers and nodes tell coordinators that they live and what they have."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc

from longreach import wire
from longreach.errors import InvalidRequest
from longreach.rpc.channels import sync_channel
from longreach.rpc.status import error_from_rpc
from longreach.rpc.tls import ChannelTls
from longreach.steps import WorkerStatus
from longreach.types import NodeStats
from longreach.v1 import cluster_pb2 as pb
from longreach.v1.cluster_pb2_grpc import ClusterServiceStub

HEARTBEAT_INTERVAL_S = 1.0
DRAIN_INTERVAL_S = 0.25
"""Time between two reports of a member that waits for leave to go."""
_CALL_TIMEOUT_S = 5.0
_LEAVE_TIMEOUT_S = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MemberReport:
    """A member's report: exactly one of `worker` and `node` is set.

    `incarnation` is a random number of the process's life; `address` is host:port; `host` and
    `zone` are for replica placement; `cores` counts the CPU cores it may use. `draining`: it is
    about to leave and wants to be emptied first.
    """

    member_id: str
    incarnation: int
    address: str
    host: str
    zone: str
    cores: int
    worker: WorkerStatus | None = None
    node: NodeStats | None = None
    draining: bool = False


def report_to_proto(report: MemberReport) -> pb.HeartbeatRequest:
    """The report as a message."""
    return pb.HeartbeatRequest(
        member_id=report.member_id,
        incarnation=report.incarnation,
        address=report.address,
        host=report.host,
        zone=report.zone,
        cores=report.cores,
        draining=report.draining,
        worker=None if report.worker is None else wire.worker_status_to_proto(report.worker),
        node=None if report.node is None else wire.node_stats_to_proto(report.node),
    )


def report_from_proto(msg: pb.HeartbeatRequest) -> MemberReport:
    """The report in a message; raises InvalidRequest without a name, an address or a kind."""
    kind = msg.WhichOneof("kind")
    if kind is None or not msg.member_id or not msg.address:
        raise InvalidRequest(
            f"heartbeat of member {msg.member_id!r} at {msg.address!r} as {kind}; a member has an "
            "id, an address and is a worker or a node"
        )
    return MemberReport(
        member_id=msg.member_id,
        incarnation=msg.incarnation,
        address=msg.address,
        host=msg.host,
        zone=msg.zone,
        cores=msg.cores,
        draining=msg.draining,
        worker=wire.worker_status_from_proto(msg.worker) if kind == "worker" else None,
        node=wire.node_stats_from_proto(msg.node) if kind == "node" else None,
    )


class HeartbeatSender:
    """Reports to every coordinator from background threads, one each, until stopped.

    The first report registers the member. A coordinator that does not answer is tried again at the
    next beat and delays nobody else. `member` is called for each report.
    """

    def __init__(
        self,
        coordinators: Sequence[str],
        member: Callable[[], MemberReport],
        *,
        interval_s: float = HEARTBEAT_INTERVAL_S,
        tls: ChannelTls | None = None,
    ) -> None:
        self._member = member
        self._interval_s = interval_s
        self._tls = tls
        self._changed = threading.Condition()
        self._stopping = False
        self._draining = False
        self._may_leave: dict[str, bool | None] = {}
        self._registered = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._run, args=(address,), name=f"heartbeat-{address}", daemon=True
            )
            for address in coordinators
        ]

    def start(self) -> None:
        """Begins to report."""
        for thread in self._threads:
            thread.start()

    def wait_registered(self, timeout_s: float | None = None) -> bool:
        """Waits until some coordinator has taken a report; False when the time ran out."""
        return self._registered.wait(timeout_s)

    def drain(self, timeout_s: float, idle: Callable[[], bool] = lambda: True) -> bool:
        """Reports from now on that the member is about to leave, and waits until the leading
        coordinator lets it go and it is `idle`, or the time is over.

        Whether it may go. At once False where no coordinator answers, or there is none.
        """
        with self._changed:
            self._draining = True
            self._changed.notify_all()
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with self._changed:
                self._changed.wait(DRAIN_INTERVAL_S)
                answers = list(self._may_leave.values())
            if len(answers) == len(self._threads) and all(each is None for each in answers):
                return False
            if any(answers) and idle():
                return True
        return False

    def stop(self) -> None:
        """Stops reporting and takes leave, so that the member gets no new work."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:  # Started.
                thread.join()

    def _run(self, address: str) -> None:
        with sync_channel(address, tls=self._tls) as channel:
            stub = ClusterServiceStub(channel)
            answered = True
            interval_s = self._interval_s
            while True:
                draining = self._draining
                may_leave: bool | None = None
                try:
                    report = self._member()
                    request = report_to_proto(dataclasses.replace(report, draining=draining))
                    response = stub.Heartbeat(request, timeout=_CALL_TIMEOUT_S)
                    interval_s = response.interval_ms / 1e3 or self._interval_s
                    may_leave = response.may_leave
                    self._registered.set()
                    answered = True
                except grpc.RpcError as error:
                    if answered:
                        meant = error_from_rpc(error, peer=address)
                        _log.warning("no heartbeat to coordinator %s: %s", address, meant)
                    answered = False
                except Exception:
                    _log.exception("no report for coordinator %s", address)
                else:
                    self._asked_to_drain(response.drain)
                if self._pause(address, interval_s, draining, may_leave):
                    break
            if answered:
                self._leave(stub)

    def _asked_to_drain(self, asked: bool) -> None:
        if asked and not self._draining:
            _log.info("an operator wants this member emptied; it takes nothing new")
            with self._changed:
                self._draining = True
                self._changed.notify_all()

    def _pause(self, address: str, interval_s: float, told: bool, may_leave: bool | None) -> bool:
        """Waits for the next report, which is due at once when the draining begins; whether to
        stop instead. `told`: whether the last report said that it has begun."""
        with self._changed:
            if told:
                self._may_leave[address] = may_leave
                interval_s = min(interval_s, DRAIN_INTERVAL_S)
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopping or self._draining != told, interval_s)
            return self._stopping

    def _leave(self, stub: ClusterServiceStub) -> None:
        member = self._member()
        request = pb.LeaveRequest(member_id=member.member_id, incarnation=member.incarnation)
        with contextlib.suppress(grpc.RpcError):
            stub.Leave(request, timeout=_LEAVE_TIMEOUT_S)
