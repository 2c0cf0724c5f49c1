"""The coordinator as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from longreach.rpc.channels import sync_channel
from longreach.v1 import generation_pb2 as pb
from longreach.v1 import generation_pb2_grpc


def _start(*flags: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "coordinator", "--listen", "127.0.0.1:0", *flags],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def process():
    started = _start(LONGREACH_CLUSTER_SECRET="s")
    yield started
    started.kill()
    started.communicate()


def test_it_says_where_it_serves_answers_and_ends_on_sigterm(process):
    word, address = process.stdout.readline().split()
    assert word == "serving"
    with sync_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        status = stub.GetStatus(pb.GetStatusRequest(), timeout=10)
        assert list(status.members) == []
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(pb.GenerateRequest(text="x"), timeout=10))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    assert process.stdout.read() == ""  # stdout carries the one line only


def test_its_services_can_be_listed_by_reflection(process):
    address = process.stdout.readline().split()[1]
    with sync_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        reply = next(iter(stub.ServerReflectionInfo(iter([request]), timeout=10)))
    names = {service.name for service in reply.list_services_response.service}
    assert {
        "longreach.v1.GenerationService",
        "longreach.v1.ClusterService",
        "grpc.health.v1.Health",
    } <= names


def test_it_refuses_to_start_without_a_secret_and_says_how_to_set_one():
    started = _start(LONGREACH_CLUSTER_SECRET="")
    _, log = started.communicate(timeout=30)
    assert started.returncode == 2
    assert "LONGREACH_CLUSTER_SECRET" in log
