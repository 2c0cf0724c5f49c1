"""What a piece of code counts, for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from longreach.telemetry.instruments import Distribution, collect, switch_off, switch_on

Read = Callable[..., float]


@contextmanager
def measured(service: str) -> Iterator[Read]:
    """Counts from zero; `read(name, **labels)` is a metric's sum, or a histogram's observations,
    over the series with these labels."""
    switch_on(service, {"engine": "test"})

    def read(name: str, **labels: str) -> float:
        found = [each.series for each in collect() if each.metric.name == name]
        return sum(
            sum(value.counts) if isinstance(value, Distribution) else value
            for series in found
            for at, value in series
            if labels.items() <= at.items()
        )

    try:
        yield read
    finally:
        switch_off()
