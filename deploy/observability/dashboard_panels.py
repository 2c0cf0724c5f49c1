"""What dashboards are made of: panels in rows, and PromQL over metrics of one release."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

RELEASE = 'release=~"$release"'
MODEL = 'release=~"$release", model_name=~"$model"'
RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Query:
    """One PromQL expression and how its series are named."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """A chart: what it shows, in which unit (Grafana's name), and how a reader takes it.

    `kind` is Grafana's panel type; `width` in columns, `height` in grid rows. `maximum` bounds the
    axis; `alarm` colours a stat red from there on, or below it where `alarm_below`.
    """

    title: str
    description: str
    unit: str
    queries: Sequence[Query]
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    maximum: float | None = None
    stacked: bool = False
    alarm: float | None = None
    alarm_below: bool = False


@dataclass(frozen=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Dashboard:
    """A page: `uid` is part of its address."""

    uid: str
    title: str
    description: str
    rows: Sequence[Row]
    by_model: bool = False


# Expressions.


def total(metric: str, by: str = "", where: str = RELEASE) -> str:
    """The sum of a gauge."""
    return f"{_over('sum', by)} (longreach:{metric}{{{where}}})"


def largest(metric: str, by: str = "", where: str = RELEASE) -> str:
    """The largest of a gauge: what every coordinator reports alike."""
    return f"{_over('max', by)} (longreach:{metric}{{{where}}})"


def rate(counter: str, by: str = "", where: str = RELEASE) -> str:
    """Growth of a counter per second; `counter` without its _total."""
    return f"{_over('sum', by)} (rate(longreach:{counter}_total{{{where}}}{RATE}))"


def mean(histogram: str, by: str = "", where: str = RELEASE) -> str:
    """The mean of what a histogram saw."""
    return f"{_sum(histogram, 'sum', by, where)} / {_sum(histogram, 'count', by, where)}"


def quantile(share: float, histogram: str, by: str = "", where: str = RELEASE) -> str:
    """A quantile of what a histogram saw."""
    labels = f"{by}, le" if by else "le"
    return f"histogram_quantile({share}, {_sum(histogram, 'bucket', labels, where)})"


def percentiles(histogram: str, by: str, legend: str, where: str = RELEASE) -> list[Query]:
    """Median, 95th and 99th percentile."""
    return [
        Query(quantile(share, histogram, by, where), f"{legend} p{share * 100:.0f}".strip())
        for share in (0.5, 0.95, 0.99)
    ]


def _sum(histogram: str, part: str, by: str, where: str) -> str:
    return f"{_over('sum', by)} (rate(longreach:{histogram}_{part}{{{where}}}{RATE}))"


def _over(aggregation: str, by: str) -> str:
    return f"{aggregation} by ({by})" if by else aggregation


def stat(title: str, description: str, unit: str, expr: str, **more: Any) -> Panel:
    """One number."""
    return Panel(title, description, unit, [Query(expr)], "stat", 4, 4, **more)
