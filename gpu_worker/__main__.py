"""Starts a GPU worker: `python -m gpu_worker --help`."""

from __future__ import annotations

import dataclasses
import gc
import logging
import sys
import time
from collections.abc import Sequence

import torch

from gpu_worker import metrics
from gpu_worker.config import WorkerConfig
from gpu_worker.conformance import require_conformance
from gpu_worker.engine import Engine
from gpu_worker.membership import worker_reports
from gpu_worker.model import load_model
from gpu_worker.server import start_server
from longreach.config import read_config
from longreach.errors import InvalidRequest, LongreachError
from longreach.logging import configure
from longreach.process import wait_for_stop
from longreach.rpc.membership import HeartbeatSender
from longreach.rpc.tls import ChannelTls
from longreach.security.peers import Role
from longreach.security.tls import member_files
from longreach.telemetry.service import Telemetry

_LOG = logging.getLogger("gpu_worker")
_GRACE_S = 2.0
_HAND_OVER_S = 5.0
_POLL_S = 0.05


def run(config: WorkerConfig) -> None:
    """Loads the model, serves until told to stop."""
    if not config.cluster_secret:
        raise InvalidRequest(
            "no cluster secret; set LONGREACH_CLUSTER_SECRET to the same random text on every "
            "service, so that the worker can check what the coordinator signed"
        )
    files = member_files(config, Role.WORKER, config.worker_id)
    if files is not None and files.identity is not None:
        config = dataclasses.replace(config, worker_id=files.identity.member_id)
    telemetry = Telemetry(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    model = load_model(config.model, config.device, config.dtype)
    conformance = require_conformance(model)
    _LOG.info("model %s conforms to eager attention: %s", model.info.model, conformance)
    engine = Engine(model, config, files)
    # The model and its libraries are here to stay: a full collection in the middle of a step would
    # walk all of their objects.
    gc.collect()
    gc.freeze()
    engine.start()
    server, address, readiness = start_server(engine, config.listen, files, config.health_listen)
    name = config.member_id(address)
    telemetry.begin("worker", name, model_name=model.info.model, files=files)
    metrics.observe(engine)
    heartbeats = HeartbeatSender(
        config.coordinator_addresses,
        worker_reports(config, address, engine.status),
        tls=ChannelTls(files, lambda _: Role.COORDINATOR.server_name) if files else None,
    )
    readiness.set(True)
    heartbeats.start()
    _LOG.info(
        "worker on %s: %s, %d session slots of %d bytes",
        address,
        model.device,
        config.max_sessions,
        engine.status().resident_capacity_bytes // config.max_sessions,
    )
    wait_for_stop(config.exit_with_parent, address=address)
    readiness.set(False)
    heartbeats.stop()
    _await_hand_over(engine)
    server.stop(_GRACE_S).wait()
    engine.stop()
    telemetry.stop()


def _await_hand_over(engine: Engine) -> None:
    """Goes on stepping until coordinators have taken the sessions elsewhere, but not for long."""
    give_up = time.monotonic() + _HAND_OVER_S
    while engine.status().sessions and time.monotonic() < give_up:
        time.sleep(_POLL_S)


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the configuration and runs; returns the exit status."""
    try:
        configure(service="worker")
        config = read_config(WorkerConfig, "gpu_worker", argv)
        configure(format=config.log_format)
        run(config)
    except LongreachError as error:
        _LOG.error("%s", error.message)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
