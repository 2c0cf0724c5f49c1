"""Writes the services' settings into the chart: `python deploy/helm/settings.py [--check]`.

Every field of a service's config dataclass becomes a commented default in values.yaml and a
property of values.schema.json, except those that the chart itself sets (CHART_SETS). `--check`
writes nothing and fails where the files differ, so that the chart never knows a setting that no
service reads, nor misses one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import textwrap
import typing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from coordinator.config import CoordinatorConfig  # noqa: E402
from coordinator.kubernetes.settings import KubernetesSettings  # noqa: E402
from gpu_worker.config import WorkerConfig  # noqa: E402
from retrieval_node.config import NodeConfig  # noqa: E402

CHART = ROOT / "deploy" / "helm" / "longreach"
SERVICES: dict[str, type] = {
    "coordinator": CoordinatorConfig,
    "worker": WorkerConfig,
    "retrievalNode": NodeConfig,
}

_TLS = {"tls_cert", "tls_key", "tls_ca", "health_listen"}
_TELEMETRY = {"metrics_listen", "otlp_endpoint", "log_format"}
_EVERYWHERE = _TLS | _TELEMETRY | {"listen", "cluster_secret", "exit_with_parent"}
_KUBERNETES = {field.name for field in dataclasses.fields(KubernetesSettings)}
_MEMBER = {"advertise", "host", "coordinators"}
CHART_SETS: dict[str, set[str]] = {
    "coordinator": _EVERYWHERE
    | _KUBERNETES
    | {"api_keys_file", "catalog", "cluster_listen", "http_listen", "coordinator_id", "data_dir"},
    "worker": _EVERYWHERE | _MEMBER | {"worker_id", "model"},
    "retrievalNode": _EVERYWHERE | _MEMBER | {"node_id", "snapshot_dir"},
}
"""Settings that follow from the chart's own values or from Kubernetes, and are not in `config`."""

_INDENT = "    "
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def settings_of(service: str) -> list[dataclasses.Field[Any]]:
    """Fields that a user sets, in the dataclass's order."""
    fields = dataclasses.fields(SERVICES[service])
    return [field for field in fields if field.name not in CHART_SETS[service]]


def values_lines(service: str) -> list[str]:
    """The lines of values.yaml for a service's settings, with their prose."""
    lines = []
    for field in settings_of(service):
        prose = " ".join(field.metadata["help"].split())
        lines += textwrap.wrap(
            prose, 96, initial_indent=f"{_INDENT}# ", subsequent_indent=f"{_INDENT}# "
        )
        lines.append(f"{_INDENT}{field.name}: {_literal(field)}")
    return lines


def schema_of(service: str) -> dict[str, Any]:
    """The JSON schema of a service's settings."""
    kinds = typing.get_type_hints(SERVICES[service])
    properties = {f.name: _property(f.name, kinds[f.name]) for f in settings_of(service)}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _literal(field: dataclasses.Field[Any]) -> str:
    """A default as YAML; byte counts with a unit where one fits."""
    default: Any = field.default
    if field.name.endswith("_bytes") and default:
        for size, unit in _UNITS:
            if default % size == 0:
                return f"{default // size}{unit}"
    return json.dumps(default)


def _property(name: str, kind: type) -> dict[str, Any]:
    if name.endswith("_bytes"):
        size = r"^[0-9.]+\s*([KMGkmg]([iI]?[bB]))?$"
        return {"type": ["integer", "string"], "minimum": 0, "pattern": size}
    names = {str: "string", int: "integer", float: "number", bool: "boolean"}
    return {"type": names[kind]}


def values_text(current: str) -> str:
    """values.yaml with every service's settings between its markers."""
    for service in SERVICES:
        begin, end = f"{_INDENT}# BEGIN {service}\n", f"{_INDENT}# END {service}\n"
        lines = "".join(f"{line}\n" for line in values_lines(service))
        pattern = re.escape(begin) + r".*?" + re.escape(end)
        current, found = re.subn(pattern, lambda _: begin + lines + end, current, flags=re.S)  # noqa: B023
        if found != 1:
            raise SystemExit(f"values.yaml has {found} sections between {begin.strip()} and END")
    return current


def schema_text(current: str) -> str:
    """values.schema.json with every service's settings under $defs."""
    schema = json.loads(current)
    for service in SERVICES:
        schema["$defs"][f"{service}Config"] = schema_of(service)
    return json.dumps(schema, indent=2) + "\n"


def stale_files() -> dict[Path, str]:
    """Chart files that differ from what the services say, with the text they should have."""
    wanted = {
        CHART / "values.yaml": values_text,
        CHART / "values.schema.json": schema_text,
    }
    texts = {path: make(path.read_text()) for path, make in wanted.items()}
    return {path: text for path, text in texts.items() if text != path.read_text()}


def main() -> int:
    """Writes or checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where files differ")
    check = parser.parse_args().check
    stale = stale_files()
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)} {'differs from the services' if check else 'written'}")
        if not check:
            path.write_text(text)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
