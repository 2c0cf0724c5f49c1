"""How long a fault silenced the streams: pure functions over the times at which tokens came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def longest_silence(stamps: Sequence[float], start: float, stop: float) -> float:
    """The longest time in [start, stop] during which a stream made no progress, seconds.

    `stamps` are ascending times of progress. Silence that began before `start` counts from there:
    it is not the fault's.
    """
    inside = [start, *(stamp for stamp in stamps if start < stamp < stop), stop]
    return float(np.diff(inside).max())


def recovery_s(streams: Mapping[str, Sequence[float]], fault: float, until: float) -> float:
    """From a fault until every stream makes progress again, seconds.

    The longest silence of any stream between the fault and `until`. So a stream that takes one more
    token and stops then, or that stops when the fault is lifted, is counted too.
    """
    return max(longest_silence(stamps, fault, until) for stamps in streams.values())


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed; 0 for none."""
    return float(np.quantile(values, share, method="inverted_cdf")) if values else 0.0
