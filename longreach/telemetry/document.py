"""The tables of docs/metrics.md: `python -m longreach.telemetry.document` prints them."""

from __future__ import annotations

from longreach.telemetry.names import COORDINATOR, METRICS, NODE, WORKER, Metric
from longreach.telemetry.spelling import otlp_name, prometheus_name

_TITLES = {COORDINATOR: "Coordinator", WORKER: "GPU worker", NODE: "Retrieval node"}


def tables() -> str:
    """One table per service, in Markdown."""
    return "\n".join(_table(service, title) for service, title in _TITLES.items())


def _table(service: str, title: str) -> str:
    rows = [_row(metric) for metric in METRICS.values() if service in metric.services]
    head = "| on /metrics | on OTLP | kind | unit | labels | what |\n|---|---|---|---|---|---|"
    return "\n".join([f"### {title}", head, *rows, ""])


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{name}`" for name in metric.labels)
    unit = metric.unit.strip("{}") if metric.unit != "1" else ""
    name = prometheus_name(metric)
    return (
        f"| `{name}` | `{otlp_name(metric)}` | {metric.kind.value} | {unit} | {labels} | "
        f"{metric.help} |"
    )


if __name__ == "__main__":
    print(tables(), end="")
