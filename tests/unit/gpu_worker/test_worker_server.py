"""A worker as its coordinator sees it: over gRPC, and as a process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from worker_cluster import SECRET, Cluster, cluster
from worker_models import eager_logits, random_model, random_tokens, saved_model

from gpu_worker.config import WorkerConfig
from gpu_worker.membership import worker_reports
from gpu_worker.server import SERVICE_NAME, start_server
from longreach.config import read_config
from longreach.errors import InvalidRequest, NotFound, Unavailable
from longreach.rpc.worker import WorkerClient
from longreach.security import Capability, sign
from longreach.steps import StepRow
from longreach.types import Budget, SessionRecord
from longreach.v1 import worker_pb2 as pb
from longreach.v1.worker_pb2_grpc import WorkerServiceStub

CONTEXT = 200
TOKENS = random_tokens(CONTEXT + 60)


@contextmanager
def served(nodes: Cluster) -> Iterator[str]:
    server, address, readiness = start_server(nodes.engine(), "127.0.0.1:0")
    readiness.set(True)
    try:
        yield address
    finally:
        server.stop(0).wait()


def session(to_context: str, stop: int, session_id: str = "s") -> tuple[SessionRecord, bytes]:
    record = SessionRecord(session_id, to_context, stop, "", 1)
    capability = Capability("read", "", to_context, time.time() + 60, session_id, 1)
    return record, sign(capability, SECRET.encode())


async def test_a_context_is_prefilled_and_asked_over_grpc() -> None:
    model = random_model("llama")
    want = eager_logits(model, TOKENS)
    with cluster(model) as nodes, served(nodes) as address:
        client = WorkerClient(address)
        to = nodes.destination(CONTEXT)
        progress = [
            each
            async for each in client.prefill(
                to.context_id, TOKENS[:CONTEXT], to.identity, to.shard_map, to.capability
            )
        ]
        assert progress[-1].summary is not None
        record, capability = session(to.context_id, CONTEXT)
        budget = Budget(exact=True)
        stop, _ = await client.open_session(record, to.identity, to.shard_map, capability, budget)
        assert stop == CONTEXT
        outcomes = await asyncio.gather(
            *(client.step([StepRow("s", at, (TOKENS[at],), True)]) for at in range(CONTEXT, 240))
        )
        for at, outcome in zip(range(CONTEXT, 240), outcomes, strict=True):
            logprobs = torch.log_softmax(want[at], -1)
            (result,) = outcome.results
            assert result.error is None
            assert result.logprob == pytest.approx(float(logprobs.max()), abs=2e-4)
        status = await client.status()
        assert status.model == model.info
        assert status.sessions == 1
        assert await client.close_session("s")
        assert (await client.status()).resident_used_bytes == 0
        await client.close()


async def test_bad_requests_are_refused_and_the_stream_goes_on() -> None:
    model = random_model("llama")
    with cluster(model) as nodes, served(nodes) as address:
        client = WorkerClient(address)
        outcome = await client.step([StepRow("nobody", 0, (1,), True)])
        assert isinstance(outcome.results[0].error, NotFound)
        to = nodes.destination(CONTEXT)
        with pytest.raises(InvalidRequest, match="0 tokens"):
            async for _ in client.prefill(
                to.context_id, [], to.identity, to.shard_map, to.capability
            ):
                pass
        record, capability = session(to.context_id, CONTEXT)
        with pytest.raises(NotFound):
            await client.open_session(
                record, to.identity, to.shard_map, capability, Budget(exact=True)
            )
        assert (await client.status()).sessions == 0
        outcome = await client.step([StepRow("nobody", 0, (1,), True)])
        assert isinstance(outcome.results[0].error, NotFound)
        await client.close()


def test_a_malformed_step_does_not_end_the_stream() -> None:
    with (
        cluster(random_model("llama")) as nodes,
        served(nodes) as address,
        grpc.insecure_channel(address) as channel,
    ):
        rows = [pb.StepRow(session_id="s", position=-1), pb.StepRow(session_id="s")]
        requests = [pb.StepRequest(step_id=i, rows=[row]) for i, row in enumerate(rows)]
        replies = list(WorkerServiceStub(channel).Step(iter(requests)))
        assert [reply.step_id for reply in replies] == [0, 1]
        assert all(reply.results[0].error.reason == "INVALID_REQUEST" for reply in replies)


async def test_a_caller_that_leaves_cancels_its_prefill() -> None:
    model = random_model("llama")
    with cluster(model, prefill_chunk_tokens=128) as nodes, served(nodes) as address:
        client = WorkerClient(address)
        to = nodes.destination(4000)
        long = random_tokens(4000)
        progress = client.prefill(to.context_id, long, to.identity, to.shard_map, to.capability)
        await anext(progress)
        await progress.aclose()  # type: ignore[attr-defined]
        deadline = time.monotonic() + 10
        while any(node.store.stats().context_bytes for node in nodes.nodes.values()):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        # The device is free again at once.
        other = nodes.destination(CONTEXT)
        async for _ in client.prefill(
            other.context_id, TOKENS[:CONTEXT], other.identity, other.shard_map, other.capability
        ):
            pass
        assert not nodes.nodes["n0"].store.inventory(to.context_id)[0]
        await client.close()


def test_health_tells_liveness_and_readiness() -> None:
    with cluster(random_model("llama")) as nodes:
        server, address, readiness = start_server(nodes.engine(), "127.0.0.1:0")
        with grpc.insecure_channel(address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            states = health_pb2.HealthCheckResponse
            for ready in (False, True):
                readiness.set(ready)
                got = check(health_pb2.HealthCheckRequest(service=SERVICE_NAME)).status
                assert got == (states.SERVING if ready else states.NOT_SERVING)
                assert check(health_pb2.HealthCheckRequest()).status == states.SERVING
        server.stop(0).wait()


def test_a_port_that_is_taken_is_an_error() -> None:
    with (
        cluster(random_model("llama")) as nodes,
        served(nodes) as address,
        pytest.raises(Unavailable, match=address),
    ):
        start_server(nodes.engine(), address)


def test_reports_name_the_worker_and_its_life() -> None:
    with cluster(random_model("llama")) as nodes:
        engine = nodes.engine()
        config = replace(nodes.config, worker_id="w7", zone="z", advertise="outside:1")
        report = worker_reports(config, "127.0.0.1:5", engine.status)()
        assert (report.member_id, report.address, report.zone) == ("w7", "outside:1", "z")
        assert report.worker == engine.status()
        assert report.node is None
        assert worker_reports(config, "127.0.0.1:5", engine.status)().incarnation != (
            report.incarnation
        )


@pytest.mark.parametrize(
    "flags",
    [
        ["--window-tokens", "0"],
        ["--max-sessions", "0"],
        ["--prefill-chunk-tokens", "10"],
        ["--dtype", "int8"],
    ],
)
def test_settings_out_of_range_are_refused_by_name(flags: list[str]) -> None:
    with pytest.raises(InvalidRequest, match=flags[0].strip("-").replace("-", "_")):
        read_config(WorkerConfig, "gpu_worker", flags, {})


def run_worker(*flags: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "LONGREACH_CLUSTER_SECRET": SECRET, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "gpu_worker", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.cluster
def test_the_process_announces_itself_and_stops_when_told(tmp_path: Path) -> None:
    model = saved_model("qwen3", tmp_path / "tiny")
    process = run_worker("--model", str(model), "--exit-with-parent", "true")
    try:
        assert process.stdout is not None
        word, address = process.stdout.readline().split()
        assert word == "serving"

        async def status() -> None:
            client = WorkerClient(address)
            assert (await client.status()).model.model == "tiny"
            await client.close()

        asyncio.run(status())
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.cluster
def test_the_process_says_why_it_cannot_start() -> None:
    process = run_worker("--model", "/nowhere/at/all")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stdout == ""
    assert "/nowhere/at/all" in stderr
