"""docker-compose.yml and the Dockerfile, without Docker: settings that services read, ports and
health checks that exist, images that are what they claim."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from coordinator.config import CoordinatorConfig
from coordinator.server import GENERATION
from gpu_worker.config import WorkerConfig
from gpu_worker.server import SERVICE_NAME as WORKER_SERVICE
from longreach.config import parse_bytes, read_config
from retrieval_node.config import NodeConfig
from retrieval_node.server import SERVICE_NAME as NODE_SERVICE

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"

CONFIGS: dict[str, type] = {
    "coordinator": CoordinatorConfig,
    "retrieval-node": NodeConfig,
    "worker-cpu": WorkerConfig,
    "worker-cuda": WorkerConfig,
}
READY = {
    "coordinator": GENERATION,
    "retrieval-node": NODE_SERVICE,
    "worker-cpu": WORKER_SERVICE,
    "worker-cuda": WORKER_SERVICE,
}
NODES = ("node-0", "node-1", "node-2")


def expanded(text: str) -> str:
    """Compose's ${NAME:-default} with no variable set."""
    return re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", text)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(expanded(COMPOSE.read_text()))["services"]
    ours = "deploy/docker/Dockerfile"
    return {n: each for n, each in found.items() if each.get("build", {}).get("dockerfile") == ours}


@pytest.fixture(scope="module")
def stages() -> dict[str, str]:
    """The Dockerfile's stages, each with the instructions it inherits from other stages."""
    whole: dict[str, str] = {}
    text = re.sub(r"(?m)^#.*\n", "", DOCKERFILE.read_text())
    for block in re.split(r"(?m)^(?=FROM )", text)[1:]:
        match = re.match(r"FROM (\S+) AS (\S+)", block)
        assert match
        whole[match[2]] = whole.get(match[1], "") + block
    return whole


def variables_of(stage: str) -> dict[str, str]:
    found = re.findall(r"(?<![\w{])(LONGREACH_\w+|HOME|HF_HOME)=(\S+)", stage)
    return dict(found)


def test_the_compose_file_follows_the_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    checked = subprocess.run([*command, str(COMPOSE)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_up_without_flags_is_a_whole_cluster_without_a_gpu(services: dict[str, Any]) -> None:
    default = {name for name, each in services.items() if not each.get("profiles")}
    assert default == {"coordinator", "worker", *NODES}
    assert services["worker"]["build"]["target"] == "worker-cpu"
    assert services["worker-gpu"]["profiles"] == ["gpu"]
    for name in default - {"coordinator"}:
        assert services[name]["depends_on"] == {"coordinator": {"condition": "service_started"}}


def test_a_node_may_die_and_the_catalog_outlives_the_coordinator(services: dict[str, Any]) -> None:
    everything = yaml.safe_load(expanded(COMPOSE.read_text()))["services"]
    coordinator, valkey = services["coordinator"], everything["valkey"]
    config: Any = read_config(
        CoordinatorConfig,
        "coordinator",
        [],
        {key: str(value) for key, value in coordinator["environment"].items()},
    )
    assert config.replicas == 2 < len(NODES)
    assert config.catalog == "redis://valkey:6379/0"
    assert "profiles" not in valkey
    assert valkey["healthcheck"]["test"] == ["CMD", "valkey-cli", "ping"]
    assert coordinator["depends_on"] == {"valkey": {"condition": "service_healthy"}}
    assert valkey["read_only"] is True
    # Protected mode refuses other containers where there is no password.
    assert " ".join(valkey["command"]).endswith("--protected-mode no")
    assert [each.partition(":")[2] for each in valkey["volumes"]] == ["/data"]


def test_every_variable_is_a_setting_of_its_service(services: dict[str, Any]) -> None:
    for name, service in services.items():
        config = CONFIGS[service["build"]["target"]]
        known = {f"LONGREACH_{field.name.upper()}" for field in dataclasses.fields(config)}
        assert set(service["environment"]) <= known, name
        values = {key: str(value) for key, value in service["environment"].items()}
        read: Any = read_config(config, name, [], values)
        assert read.cluster_secret


def test_members_know_the_coordinator_and_tell_a_name_that_resolves(
    services: dict[str, Any], stages: dict[str, str]
) -> None:
    def port(name: str) -> str:
        listen = variables_of(stages[services[name]["build"]["target"]])["LONGREACH_LISTEN"]
        return listen.rpartition(":")[2]

    for name in ("worker", "worker-gpu", *NODES):
        environment = services[name]["environment"]
        assert environment["LONGREACH_COORDINATORS"] == f"coordinator:{port('coordinator')}"
        assert environment["LONGREACH_ADVERTISE"] == f"{name}:{port(name)}"
    names = [services[name]["environment"]["LONGREACH_NODE_ID"] for name in NODES]
    assert len(set(names)) == len(NODES)
    published = services["coordinator"]["ports"]
    grpc_port, http_listen = (
        port("coordinator"),
        services["coordinator"]["environment"]["LONGREACH_HTTP_LISTEN"],
    )
    http_port = http_listen.rpartition(":")[2]
    wanted = [f"127.0.0.1:7300:{grpc_port}", f"127.0.0.1:8000:{http_port}"]
    assert published == wanted, "this machine only, by default"


def test_what_must_last_is_on_volumes_and_the_rest_is_read_only(services: dict[str, Any]) -> None:
    declared = yaml.safe_load(COMPOSE.read_text())["volumes"]
    for name, service in services.items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        mounts = dict(reversed(each.split(":")) for each in service["volumes"])
        assert set(mounts.values()) <= set(declared)
        variables = service["environment"]
        for setting in ("LONGREACH_DATA_DIR", "LONGREACH_SNAPSHOT_DIR"):
            assert variables.get(setting, next(iter(mounts))) in mounts, name
        assert parse_bytes(service["mem_limit"] + "ib") >= 2**30
    volumes = [services[name]["volumes"][0].split(":")[0] for name in NODES]
    assert len(set(volumes)) == len(NODES), "nodes never share snapshots"


@pytest.mark.parametrize("target", CONFIGS)
def test_images_run_their_service_as_nobody_special(stages: dict[str, str], target: str) -> None:
    stage = stages[target]
    assert re.findall(r"(?m)^USER (\S+)", stage)[-1] == "10001:10001"
    module = {"coordinator": "coordinator", "retrieval-node": "retrieval_node"}
    entry = f'ENTRYPOINT ["python", "-m", "{module.get(target, "gpu_worker")}"]'
    assert entry in stage
    listen = variables_of(stage)["LONGREACH_LISTEN"]
    port = listen.rpartition(":")[2]
    assert f"EXPOSE {port}" in stage
    check = re.findall(r"HEALTHCHECK .*\\\n\s+CMD (\[.*\])", stage)[-1]
    arguments = yaml.safe_load(check)
    assert arguments[:4] == ["python", "-m", "longreach.health", f"127.0.0.1:{port}"]
    # The coordinator's image says that it lives; compose asks whether it takes work.
    assert arguments[4:] == ([] if target == "coordinator" else [READY[target]])
    config = CONFIGS[target]
    known = {f"LONGREACH_{field.name.upper()}" for field in dataclasses.fields(config)}
    assert {each for each in variables_of(stage) if each.startswith("LONGREACH_")} <= known


def test_coordinator_is_healthy_once_it_takes_work(services: dict[str, Any]) -> None:
    test = services["coordinator"]["healthcheck"]["test"]
    assert test == ["CMD", "python", "-m", "longreach.health", "127.0.0.1:7300", GENERATION]


def test_only_workers_images_have_torch(stages: dict[str, str]) -> None:
    copied = {target: re.findall(r"COPY --from=(\S+)", stages[target]) for target in CONFIGS}
    assert copied == {
        "coordinator": ["packages-coordinator"],
        "retrieval-node": ["packages-node"],
        "worker-cpu": ["packages-cpu"],
        "worker-cuda": ["packages-cuda"],
    }
    assert "torch" not in stages["packages"]
    assert "[worker]" not in stages["packages"]
    project = (ROOT / "pyproject.toml").read_text()
    pinned = re.search(r"torch==([0-9.]+)", project)
    assert pinned
    assert f"torch=={pinned[1]}+cpu" in stages["packages-cpu"]


def test_the_base_image_is_pinned_and_everything_copied_exists(stages: dict[str, str]) -> None:
    text = DOCKERFILE.read_text()
    assert re.search(r"(?m)^ARG PYTHON_IMAGE=python:3\.11\.\d+-slim-bookworm$", text)
    assert set(re.findall(r"(?m)^FROM (\S+)", text)) - set(stages) == {"${PYTHON_IMAGE}"}
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    for sources in re.findall(r"(?m)^COPY (?:--chown=\S+ )?(?!--)(.+) \S+$", text):
        for source in sources.split():
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignored, f"{source} is kept from the builder"
