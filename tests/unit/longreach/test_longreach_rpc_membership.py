"""Heartbeats reach every coordinator, whatever the others do."""

import itertools
import socket

import pytest
from rpc_servers import Acks, serving

from longreach.errors import InvalidRequest
from longreach.rpc.membership import (
    HeartbeatSender,
    MemberReport,
    report_from_proto,
    report_to_proto,
)
from longreach.rpc.status import map_errors
from longreach.types import NodeStats, WorkFigures
from longreach.v1 import cluster_pb2 as pb
from longreach.v1.cluster_pb2_grpc import (
    ClusterServiceServicer,
    add_ClusterServiceServicer_to_server,
)

STATS = NodeStats(1, 2, 3, 4, 5, 6, 7, WorkFigures(8), "avx2")


def report(sessions=6):
    stats = NodeStats(1, 2, 3, 4, 5, sessions, 7, WorkFigures(8), "avx2")
    return MemberReport("n1", 2**64 - 1, "10.0.0.1:70", "host-a", "zone-1", 8, node=stats)


class Coordinator(ClusterServiceServicer):
    """Notes every report; asks for another 20 ms later."""

    def __init__(self):
        self.reports = Acks()
        self.left = Acks()

    @map_errors
    def Heartbeat(self, request, context):
        self.reports(report_from_proto(request))
        return pb.HeartbeatResponse(epoch=1, interval_ms=20)

    @map_errors
    def Leave(self, request, context):
        self.left(request.member_id, request.incarnation)
        return pb.LeaveResponse()


@pytest.fixture
def coordinator():
    servicer = Coordinator()
    with serving(add_ClusterServiceServicer_to_server, servicer) as (address, _):
        servicer.address = address
        yield servicer


def test_a_report_survives_the_wire():
    assert report_from_proto(report_to_proto(report())) == report()


@pytest.mark.parametrize("missing", ["member_id", "address", "node"])
def test_a_report_without_name_address_or_kind_is_refused(missing):
    message = report_to_proto(report())
    message.ClearField(missing)
    with pytest.raises(InvalidRequest, match="heartbeat of member"):
        report_from_proto(message)


def test_a_member_registers_and_goes_on_reporting_what_it_has_now(coordinator):
    counter = itertools.count(1)
    sender = HeartbeatSender([coordinator.address], lambda: report(next(counter)))
    sender.start()
    assert sender.wait_registered(10)
    told = coordinator.reports.wait(4)
    sender.stop()
    assert [each.node.sessions for (each,) in told[:4]] == [1, 2, 3, 4]


def test_stopping_takes_leave_with_the_incarnation(coordinator):
    sender = HeartbeatSender([coordinator.address], report)
    sender.start()
    coordinator.reports.wait(1)
    sender.stop()
    assert coordinator.left.told == [("n1", 2**64 - 1)]


def test_a_coordinator_that_is_away_delays_nobody_and_is_told_when_it_comes(coordinator):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    addresses = [f"127.0.0.1:{port}", coordinator.address]
    sender = HeartbeatSender(addresses, report, interval_s=0.05)
    sender.start()
    coordinator.reports.wait(5)
    late = Coordinator()
    with serving(add_ClusterServiceServicer_to_server, late, port):
        late.reports.wait(2)
        sender.stop()


def test_a_report_that_cannot_be_made_is_made_at_the_next_beat(coordinator, caplog):
    calls = itertools.count()

    def member():
        if next(calls) == 0:
            raise RuntimeError("the store is still loading")
        return report()

    sender = HeartbeatSender([coordinator.address], member, interval_s=0.02)
    sender.start()
    coordinator.reports.wait(1)
    sender.stop()
    assert "still loading" in caplog.text


def test_nobody_is_registered_until_a_coordinator_answers():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    sender = HeartbeatSender([address], report, interval_s=0.05)
    sender.start()
    assert not sender.wait_registered(0.3)
    sender.stop()


def test_a_sender_that_never_started_can_be_stopped():
    HeartbeatSender(["127.0.0.1:1"], report).stop()
