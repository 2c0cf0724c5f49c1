"""How far queries lie from the keys' distribution, in units of the keys' own spread."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longreach.types import FloatArray

RIDGE = 1e-6
"""Share of the mean variance added to every direction, so that a direction without any spread
(keys of a short context, or of few dimensions) has a large distance, not an infinite one."""


@dataclass(frozen=True, slots=True)
class KeyDistribution:
    """Mean [d] and whitening [d, d] of keys: |(x - mean) @ whitening| is the distance of x."""

    mean: FloatArray
    whitening: FloatArray

    @classmethod
    def of(cls, keys: FloatArray) -> KeyDistribution:
        """From keys [n, d]."""
        mean = keys.mean(axis=0, dtype=np.float64)
        centred = keys - mean
        covariance = centred.T @ centred / max(1, len(keys) - 1)
        dim = len(covariance)
        covariance += RIDGE * np.trace(covariance) / dim * np.eye(dim)
        variances, directions = np.linalg.eigh(covariance)
        whitening = directions / np.sqrt(variances)
        return cls(mean.astype(np.float32), whitening.astype(np.float32))

    def distances(self, x: FloatArray) -> FloatArray:
        """Mahalanobis distances [...] of x [..., d]."""
        return np.asarray(np.linalg.norm((x - self.mean) @ self.whitening, axis=-1), np.float32)


@dataclass(frozen=True, slots=True)
class Distances:
    """Mahalanobis distances to the keys' distribution: of keys held out of it [m] and of queries
    [q], and the ratio of their means.

    Which keys a query finds best does not depend on its length, but its distance does:
    `ratio_at_equal_length` is the ratio after all queries were scaled, by one factor, to the mean
    length of centred keys. It tells how unusual the queries' directions are.
    """

    keys: FloatArray
    queries: FloatArray
    ratio: float
    ratio_at_equal_length: float


def compare(keys: FloatArray, held_out: FloatArray, queries: FloatArray) -> Distances:
    """Distances of held-out keys [m, d] and queries [q, d] to the distribution of keys [n, d]."""
    distribution = KeyDistribution.of(keys)
    own = distribution.distances(held_out)
    theirs = distribution.distances(queries)
    length = np.linalg.norm(held_out - distribution.mean, axis=1).mean()
    scaled = queries * (length / np.linalg.norm(queries, axis=1).mean())
    directions = distribution.distances(distribution.mean + scaled)
    return Distances(
        own, theirs, float(theirs.mean() / own.mean()), float(directions.mean() / own.mean())
    )
