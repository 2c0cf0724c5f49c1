"""Counters, histograms and gauges of this process, cheap enough for the token path.

    _STEPS = telemetry.histogram("step_seconds").bind()     # once; exported from then on
    _STEPS.record(0.0123)                                    # any thread

    telemetry.counter("request_failure").add(code="UNAVAILABLE")
    telemetry.gauge("sessions_open").observe(lambda: len(sessions))

The SDK of OpenTelemetry takes 15 to 30 µs for one measurement (ADR 0007) and a step has dozens;
these take well under one. Nothing is counted until `switch_on`. Exporters read by `collect`.
"""

from __future__ import annotations

import bisect
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from longreach.telemetry.names import METRICS, Kind, Metric, find

Labels = Mapping[str, str]
Samples = Iterable[tuple[Labels, float]]
Reading = Callable[[], "float | Samples"]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Process:
    """Whether this process measures, as which service, and the labels that all its series have."""

    on: bool = False
    service: str = ""
    labels: Labels = dataclasses.field(default_factory=dict)


_process = _Process()


@dataclass(frozen=True, slots=True)
class Distribution:
    """What a histogram holds: observations per bucket, the last without a bound, and their sum."""

    counts: tuple[int, ...]
    sum: float


class CounterSeries:
    """A counter under one set of labels."""

    __slots__ = ("_lock", "_value")

    def __init__(self, metric: Metric) -> None:
        self._lock = threading.Lock()
        self._value: float = 0

    def add(self, amount: float = 1) -> None:
        """Counts `amount`, which is not negative."""
        if _process.on:
            with self._lock:
                self._value += amount

    def read(self) -> float:
        """The sum so far."""
        return self._value

    def clear(self) -> None:
        """Begins anew."""
        with self._lock:
            self._value = 0


class HistogramSeries:
    """A histogram under one set of labels."""

    __slots__ = ("_bounds", "_counts", "_lock", "_sum")

    def __init__(self, metric: Metric) -> None:
        self._bounds = metric.bounds
        self._lock = threading.Lock()
        self._counts = [0] * (len(metric.bounds) + 1)
        self._sum = 0.0

    def record(self, value: float) -> None:
        """Takes one observation."""
        if _process.on:
            bucket = bisect.bisect_left(self._bounds, value)
            with self._lock:
                self._counts[bucket] += 1
                self._sum += value

    def read(self) -> Distribution:
        """The observations so far."""
        with self._lock:
            return Distribution(tuple(self._counts), self._sum)

    def clear(self) -> None:
        """Begins anew."""
        with self._lock:
            self._counts = [0] * len(self._counts)
            self._sum = 0.0


S = TypeVar("S", CounterSeries, HistogramSeries)


class _Instrument(Generic[S]):
    """The series of a counter or histogram, by their labels."""

    def __init__(self, metric: Metric, make: Callable[[Metric], S]) -> None:
        self._metric = metric
        self._make: Callable[[Metric], S] = make
        self._lock = threading.Lock()
        self._series: dict[tuple[tuple[str, str], ...], S] = {}

    def bind(self, **labels: str) -> S:
        """The series of these labels, exported from now on, at zero if need be.

        Labels that the whole process has are left out. Raises ValueError for unknown ones.
        """
        unknown = labels.keys() - set(self._metric.labels)
        if unknown:
            raise ValueError(
                f"{self._metric.name} has no label {', '.join(sorted(unknown))}; it has: "
                f"{', '.join(self._metric.labels) or 'none'}"
            )
        key = tuple(sorted(labels.items()))
        with self._lock:
            series = self._series.get(key)
            if series is None:
                series = self._series[key] = self._make(self._metric)
            return series

    def series(self) -> list[tuple[dict[str, str], S]]:
        """Every series with its own labels."""
        with self._lock:
            return [(dict(key), series) for key, series in self._series.items()]

    def clear(self) -> None:
        """Has every series begin anew."""
        for _, series in self.series():
            series.clear()


class Counter(_Instrument[CounterSeries]):
    """A counter of the table."""

    def __init__(self, metric: Metric) -> None:
        super().__init__(metric, CounterSeries)

    def add(self, amount: float = 1, **labels: str) -> None:
        """Counts under these labels; `bind` them once where it happens often."""
        if _process.on:
            self.bind(**labels).add(amount)


class Histogram(_Instrument[HistogramSeries]):
    """A histogram of the table."""

    def __init__(self, metric: Metric) -> None:
        super().__init__(metric, HistogramSeries)

    def record(self, value: float, **labels: str) -> None:
        """Takes an observation under these labels; `bind` them once where it happens often."""
        if _process.on:
            self.bind(**labels).record(value)


class Gauge:
    """A gauge of the table: read from what exists, whenever somebody collects."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._reading: Reading | None = None

    def observe(self, reading: Reading) -> None:
        """Reads the gauge by calling `reading`, on any thread: a number, or numbers with labels."""
        self._reading = reading

    def samples(self) -> list[tuple[dict[str, str], float]]:
        """What it reads now; nothing, and a line in the log, where that fails."""
        if self._reading is None:
            return []
        try:
            read = self._reading()
            if isinstance(read, (int, float)):
                return [({}, read)]
            return [(dict(labels), value) for labels, value in read]
        except Exception:
            _log.exception("the gauge %s cannot be read", self._metric.name)
            return []

    def forget(self) -> None:
        """Reads no more."""
        self._reading = None


_counters = {m.name: Counter(m) for m in METRICS.values() if m.kind is Kind.COUNTER}
_histograms = {m.name: Histogram(m) for m in METRICS.values() if m.kind is Kind.HISTOGRAM}
_gauges = {m.name: Gauge(m) for m in METRICS.values() if m.kind is Kind.GAUGE}


def counter(name: str) -> Counter:
    """The counter of that name; raises LookupError for one that is not in the table."""
    return _counters[find(name, Kind.COUNTER).name]


def histogram(name: str) -> Histogram:
    """The histogram of that name; raises LookupError for one that is not in the table."""
    return _histograms[find(name, Kind.HISTOGRAM).name]


def gauge(name: str) -> Gauge:
    """The gauge of that name; raises LookupError for one that is not in the table."""
    return _gauges[find(name, Kind.GAUGE).name]


def measuring() -> bool:
    """Whether anything is counted: what is dear to find out is found out only then."""
    return _process.on


def switch_on(service: str, labels: Labels) -> None:
    """Begins to count, from zero; all series get these labels, as far as they have them."""
    for each in _counters.values():
        each.clear()
    for every in _histograms.values():
        every.clear()
    _process.service, _process.labels = service, dict(labels)
    _process.on = True


def pause(paused: bool) -> None:
    """Counts nothing for a while; for benchmarks, which compare."""
    _process.on = not paused


def switch_off() -> None:
    """Counts no more, and reads no gauge."""
    _process.on = False
    for each in _gauges.values():
        each.forget()


@dataclass(frozen=True, slots=True)
class Collected:
    """A metric as it stands: its series with all their labels."""

    metric: Metric
    series: tuple[tuple[dict[str, str], float | Distribution], ...]


def collect() -> list[Collected]:
    """Every metric of this service that has series, in the order of the table."""
    found = []
    for metric in METRICS.values():
        if _process.service not in metric.services:
            continue
        own: list[tuple[dict[str, str], float | Distribution]]
        if metric.kind is Kind.GAUGE:
            own = list(_gauges[metric.name].samples())
        elif metric.kind is Kind.COUNTER:
            own = [(at, each.read()) for at, each in _counters[metric.name].series()]
        else:
            own = [(at, each.read()) for at, each in _histograms[metric.name].series()]
        names = ("engine", *metric.labels)
        shared = {name: _process.labels[name] for name in names if name in _process.labels}
        if own:
            found.append(Collected(metric, tuple(({**shared, **at}, value) for at, value in own)))
    return found
