"""Fits the sketch of one KV head: which directions of the keys a short code should keep.

Inner products with queries matter, not distances between keys, and queries do not look like keys
(RetrievalAttention, arXiv 2409.10516, section 2.3). So keys are centred (q . mean is the same for
every key of a query, the ranking is unchanged) and whitened by the second moment of sampled prefill
queries: with S = E[q q'] over queries and C the covariance of keys, the eigenvectors of S^1/2 C
S^1/2, strongest first, are the directions that explain most of the variance of q . k. The leading
dimensions get 8 bits, the next 4 bits, the rest is dropped; what is dropped has known variance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longreach.types import FloatArray, StorageArray
from retrieval_node.kernel import SketchCode, encode_sketch

SAMPLED_KEYS = 8192
"""Keys, evenly spaced, that moments are taken of."""

EIGHT_CLIP = 4.5
"""Range of an 8-bit dimension: this many standard deviations either side."""

FOUR_CLIP = 2.6
"""Range of a 4-bit dimension, in standard deviations: with 16 levels, coverage costs resolution."""

FORMATS = ((2, 2), (2, 4), (2, 6))
"""(eight, four): codes of 16, 24 and 32 bytes, that is 24, 40 and 56 dimensions."""

ERROR_SHARE = 0.03
"""A code may leave out this share of the variance of q . k; else the next larger one is taken."""


@dataclass(frozen=True, slots=True)
class Whitening:
    """Whitened key = transform @ (key - mean), whitened query = query_transform @ query.

    mean [d], both transforms [d, d], rows strongest first; variance [d] of the whitened keys.
    """

    mean: FloatArray
    transform: FloatArray
    query_transform: FloatArray
    variance: FloatArray


def fit_sketch(
    keys: StorageArray,
    values: StorageArray,
    queries: FloatArray | None,
    format: tuple[int, int] | None = None,
) -> SketchCode:
    """Sketch of one KV head: keys [n, d], values [n, value_dim].

    `queries` [group, samples, d] are prefill queries of the heads that share the KV head; without
    them whitening is by the keys alone. `format` (eight, four) forces a code's size. Raises
    ValueError if a key is not finite.
    """
    sample = sampled_keys(keys)
    whitening = fit_whitening(sample, queries)
    eight, four = format or choose_format(whitening.variance)
    dims = 4 * eight + 8 * four
    kept = min(dims, sample.shape[1])
    deviation = np.sqrt(whitening.variance[:kept])
    coarse = np.arange(kept) >= 4 * eight
    clip = np.where(coarse, FOUR_CLIP, EIGHT_CLIP).astype(np.float32)
    levels = np.where(coarse, 15, 255).astype(np.float32)
    low = (-clip * deviation).astype(np.float32)
    step = (2 * clip * deviation / levels).astype(np.float32)
    per_step = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
    weights = np.zeros((dims, sample.shape[1]), np.float32)
    weights[:kept] = whitening.transform[:kept] * per_step[:, None]
    bias = np.zeros(dims, np.float32)
    bias[:kept] = 0.5 - low * per_step - weights[:kept] @ whitening.mean
    codes, summaries = encode_sketch(keys, values, eight, four, weights, bias)
    whitened = (sample - whitening.mean) @ whitening.transform[:kept].T
    noise = rounding_noise(np.asarray(whitened, np.float32), low, step)
    model = np.concatenate(
        [
            whitening.query_transform.ravel(),
            whitening.mean,
            *(np.pad(each, (0, dims - kept)) for each in (step, low, noise)),
            whitening.variance,
        ]
    ).astype(np.float32)
    return SketchCode(eight, four, codes, summaries, model)


def sampled_keys(keys: StorageArray) -> FloatArray:
    """At most SAMPLED_KEYS evenly spaced rows as float32; ValueError if one is not finite."""
    stride = max(1, len(keys) // SAMPLED_KEYS)
    sample = np.asarray(keys[::stride], np.float32)
    finite = np.isfinite(sample).all(axis=1)
    if not finite.all():
        bad = int(np.flatnonzero(~finite)[0]) * stride
        raise ValueError(f"key {bad} holds NaN or infinity; a sketch needs finite keys")
    return sample


def fit_whitening(sample: FloatArray, queries: FloatArray | None) -> Whitening:
    """Directions of most variance of q . k, for keys like `sample` [m, d]."""
    mean = sample.mean(axis=0) if len(sample) else np.zeros(sample.shape[1], np.float32)
    centred = sample - mean
    covariance = (centred.T @ centred).astype(np.float64) / max(1, len(sample))
    moment = query_moment(queries, sample.shape[1])
    spread, basis = np.linalg.eigh(moment)
    root = (basis * np.sqrt(spread)) @ basis.T
    inverse_root = (basis / np.sqrt(spread)) @ basis.T
    variance, directions = np.linalg.eigh(root @ covariance @ root)
    variance, directions = variance[::-1], directions[:, ::-1]
    return Whitening(
        mean.astype(np.float32),
        (directions.T @ root).astype(np.float32),
        (directions.T @ inverse_root).astype(np.float32),
        np.maximum(variance, 0).astype(np.float32),
    )


def query_moment(queries: FloatArray | None, dim: int) -> np.ndarray:
    """Second moment [d, d] of queries [group, samples, d], trace d; the identity without any.

    Each query head counts the same whatever its norm. Few samples are shrunk towards the identity,
    so that no direction is taken for one that no query looks along.
    """
    identity = np.eye(dim)
    if queries is None or queries.shape[1] == 0:
        return identity
    moment = np.zeros_like(identity)
    for each in queries.astype(np.float64):
        norm = np.square(each).sum()
        moment += each.T @ each / (norm if norm > 0 else 1)
    if not np.trace(moment) > 0:
        return identity
    shrink = max(1e-3, min(1.0, 0.25 * dim / (queries.shape[0] * queries.shape[1])))
    return np.asarray((1 - shrink) * moment * (dim / np.trace(moment)) + shrink * identity)


def choose_format(variance: FloatArray) -> tuple[int, int]:
    """The shortest code that leaves out at most ERROR_SHARE of the variance of q . k."""
    total = float(variance.sum())
    for eight, four in FORMATS:
        dims = 4 * eight + 8 * four
        if dims >= len(variance) or float(variance[dims:].sum()) <= ERROR_SHARE * total:
            return eight, four
    return FORMATS[-1]


def rounding_noise(whitened: FloatArray, low: FloatArray, step: FloatArray) -> FloatArray:
    """Mean square error [dims] of whitened keys [m, dims] after rounding and clipping to a code."""
    if not len(whitened):
        return np.zeros_like(low)
    levels = np.where(step > 0, np.rint(-2 * low / np.where(step > 0, step, 1)), 0)
    codes = np.rint((whitened - low) / np.where(step > 0, step, 1)).clip(0, levels)
    error = np.square(whitened - (low + codes * step)).mean(axis=0)
    return np.asarray(np.where(step > 0, error, 0), np.float32)
