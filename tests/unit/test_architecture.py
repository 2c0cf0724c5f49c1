"""The structure promised in docs/architecture.md, checked against the imports as they stand."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("coordinator", "gpu_worker", "retrieval_node")
PACKAGES = ("longreach", *SERVICES)


def imports_of(path: Path) -> Iterator[str]:
    """Every module a file imports, at any depth of its code, relative imports resolved."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            )
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def sources(package: str) -> list[Path]:
    return [
        p for p in sorted((ROOT / package).rglob("*.py")) if "v1" not in p.relative_to(ROOT).parts
    ]


def offenders(files: list[Path], forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files
        for module in imports_of(path)
        if any(module == name or module.startswith(name + ".") for name in forbidden)
    ]


@pytest.mark.parametrize("service", SERVICES)
def test_services_never_import_each_other(service: str) -> None:
    others = tuple(s for s in SERVICES if s != service)
    assert sources(service)
    assert offenders(sources(service), others) == []


def test_the_shared_library_imports_no_service() -> None:
    assert offenders(sources("longreach"), SERVICES) == []


@pytest.mark.parametrize("package", ["longreach", "coordinator", "retrieval_node"])
def test_only_the_worker_imports_torch(package: str) -> None:
    assert offenders(sources(package), ("torch", "transformers")) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_the_protocol_is_touched_only_at_the_edges(package: str) -> None:
    edges = ("longreach/wire", "longreach/rpc/", "longreach/sdk/")
    inner = [
        p
        for p in sources(package)
        if p.name != "server.py" and not str(p.relative_to(ROOT)).startswith(edges)
    ]
    assert offenders(inner, ("longreach.v1",)) == []


@pytest.mark.parametrize("service", SERVICES)
def test_the_core_of_a_service_never_imports_grpc(service: str) -> None:
    core = [p for p in sources(service) if p.name not in ("server.py", "__main__.py")]
    assert offenders(core, ("grpc",)) == []


def test_no_file_is_named_for_nothing() -> None:
    names = {"utils", "util", "helpers", "helper", "common", "misc"}
    tracked = [p for package in (*PACKAGES, "benchmarks", "models") for p in sources(package)]
    assert [str(p) for p in tracked if p.stem in names] == []
