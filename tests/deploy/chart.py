"""The chart rendered by Helm itself, as a library, over a matrix of values."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "longreach"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))

sys.path.insert(0, str(CHART.parent))
import settings as settings  # noqa: E402

TLS: dict[str, Any] = {"tls": {"enabled": True, "issuer": {"name": "cluster-ca"}}}
MATRIX: dict[str, dict[str, Any]] = {
    "defaults": {},
    "tls": TLS,
    "no volumes": {
        "coordinator": {"persistence": {"enabled": False}},
        "retrievalNode": {"snapshots": {"enabled": False}},
    },
    "three coordinators": {
        "coordinator": {"replicas": 3},
        "catalog": {"existingSecret": "valkey", "key": "url"},
    },
    "autoscaling": {
        "coordinator": {"replicas": 2},
        "catalog": {"url": "redis://valkey:6379/0"},
        "retrievalNode": {"autoscaling": {"enabled": True, "minReplicas": 2, "maxReplicas": 8}},
    },
    "observed": {
        "telemetry": {
            "serviceMonitor": {"enabled": True, "labels": {"release": "monitoring"}},
            "prometheusRule": {"enabled": True, "runbookBase": "https://wiki.example.com/lr/"},
            "dashboards": {"enabled": True, "annotations": {"grafana_folder": "longreach"}},
        },
        "networkPolicy": {"scrapers": [{"namespaceSelector": {"matchLabels": {"team": "ops"}}}]},
    },
    "coordinators by load": {
        "coordinator": {"autoscaling": {"enabled": True, "maxReplicas": 5}},
        "catalog": {"url": "redis://valkey:6379/0"},
    },
    "coordinators by KEDA": {
        "coordinator": {
            "autoscaling": {
                "enabled": True,
                "kind": "ScaledObject",
                "prometheus": "http://prometheus.monitoring:9090",
            }
        },
        "catalog": {"url": "redis://valkey:6379/0"},
    },
    "keys": {
        "apiKeys": {"existingSecret": "who-may", "key": "keys"},
        "tests": {"apiKeySecret": "the-tests"},
    },
    "bare": {
        "telemetry": {"metrics": False},
        "coordinator": {"http": False},
        "kubernetes": {"enabled": False},
        "networkPolicy": {"enabled": False},
        "serviceAccount": {"create": False},
        "retrievalNode": {"podDisruptionBudget": {"enabled": False}, "spreadOver": []},
        "worker": {"variant": "cpu", "gpus": 0},
        "clusterSecret": {"existingSecret": "mine"},
    },
    "everything": TLS
    | {
        "image": {"registry": "registry.example.com/ai", "tag": "1.2.3", "pullSecrets": ["pull"]},
        "telemetry": {"otlpEndpoint": "http://collector.observability:4317"},
        "model": {
            "source": "/mnt/models/llama",
            "existingClaim": "models",
            "tokenSecret": {"name": "hub"},
        },
        "coordinator": {
            "service": {"type": "LoadBalancer", "port": 443, "annotations": {"a": "b"}},
            "podAnnotations": {"x": "y"},
            "persistence": {"storageClass": "fast"},
            "config": {"drain_grace_s": 90.5, "max_waiting": 2000000},
        },
        "worker": {
            "replicas": 4,
            "runtimeClassName": "nvidia",
            "nodeSelector": {"gpu": "yes"},
            "tolerations": [{"operator": "Exists"}],
        },
        "retrievalNode": {
            "replicas": 9,
            "affinity": {"nodeAffinity": {}},
            "snapshots": {"storageClass": "local"},
            "config": {"memory_limit_bytes": "64GiB"},
        },
        "networkPolicy": {"clients": [{"namespaceSelector": {"matchLabels": {"team": "app"}}}]},
    },
} | {path.stem: yaml.safe_load(path.read_text()) for path in EXAMPLES}

Document = dict[str, Any]
FOREIGN = {"monitoring.coreos.com/v1", "keda.sh/v1alpha1"}
"""Kinds of the Prometheus Operator and of KEDA, whose schemas are not Kubernetes' own."""


def documents(values: dict[str, Any]) -> list[Document]:
    rendered = Chart.load(str(CHART)).render(values, name="demo", namespace="ai")
    parts = [text for name, text in rendered.items() if not name.endswith("NOTES.txt")]
    return [doc for text in parts for doc in yaml.safe_load_all(text) if doc]


def only(docs: list[Document], kind: str, name: str) -> Document:
    found = [d for d in docs if d["kind"] == kind and d["metadata"]["name"] == name]
    assert len(found) == 1, f"{kind} {name}: {len(found)} of them"
    return found[0]


def workloads(docs: list[Document]) -> dict[str, Document]:
    """Pod specs by service."""
    kinds = {
        "coordinator": ("StatefulSet", "demo-longreach-coordinator"),
        "worker": ("Deployment", "demo-longreach-worker"),
        "retrievalNode": ("StatefulSet", "demo-longreach-node"),
    }
    return {
        service: only(docs, *which)["spec"]["template"]["spec"] for service, which in kinds.items()
    }


def environment(container: Document) -> dict[str, str]:
    return {each["name"]: each.get("value", "from elsewhere") for each in container["env"]}
