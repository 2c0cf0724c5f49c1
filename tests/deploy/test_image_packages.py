"""Each image carries the packages that its service imports, and no others."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {"coordinator": "coordinator", "retrieval_node": "node", "gpu_worker": "worker"}
OURS = {"longreach", "coordinator", "retrieval_node", "gpu_worker", "library", "models"}
NOT_IN_IMAGES = {
    "longreach/quickstart": "runs on a developer's machine, with every service's packages",
}
BY_OTHERS = {
    "safetensors": "transformers reads weights with it",
    "opentelemetry-api": "", "opentelemetry-sdk": "", "prometheus-client": "",
    "grpcio-status": "imported as grpc_status",
}  # fmt: skip


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\s=<>!\[;]", name, maxsplit=1)[0]).lower()


def declared(extra: str = "") -> set[str]:
    """Names of the base dependencies, or of an extra."""
    if extra:
        return {normal(each) for each in PROJECT["optional-dependencies"][extra]}
    return {normal(each) for each in PROJECT["dependencies"]}


def imported(package: str) -> dict[str, Path]:
    """Distributions that a package's files import, each with a file that does."""
    owners = importlib.metadata.packages_distributions()
    found: dict[str, Path] = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        if str(path.parent.relative_to(ROOT)) in NOT_IN_IMAGES:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            for module in modules:
                top = module.split(".")[0]
                if top in sys.stdlib_module_names or top in OURS or module.startswith("google."):
                    continue
                if top in owners:  # a module of the evaluation or of a test tool is not installed
                    names = sorted(map(normal, owners[top]))
                    # Several share a namespace such as opentelemetry: one that is declared, if any.
                    found.setdefault(next(filter(declared().__contains__, names), names[0]), path)
    return found


@pytest.mark.parametrize("service", EXTRAS)
def test_what_a_service_imports_is_in_its_image(service: str) -> None:
    carried = declared() | declared(EXTRAS[service])
    if service == "gpu_worker":
        carried |= {"triton"}  # comes with CUDA builds of torch; guarded elsewhere
    if service == "coordinator":
        carried |= {"huggingface-hub"}  # tokenizers' own
    for package in ("longreach", service):
        missing = {name: path for name, path in imported(package).items() if name not in carried}
        if package == "longreach":
            missing = {name: path for name, path in missing.items() if "evaluation" not in name}
        assert not missing, missing


@pytest.mark.parametrize("service", EXTRAS)
def test_what_an_image_carries_is_imported(service: str) -> None:
    used = {**imported("longreach"), **imported(service)}
    unused = declared(EXTRAS[service]) - used.keys() - BY_OTHERS.keys()
    assert not unused


def test_all_services_together_are_one_extra() -> None:
    assert PROJECT["optional-dependencies"]["cluster"] == ["longreach[coordinator,node,worker]"]
    assert "longreach[cluster]" in PROJECT["optional-dependencies"]["dev"]
