"""Synthetic keys, values and queries of one KV head, with the statistics of attention in LLMs.

What is kept of real heads, because it decides how hard retrieval is:

- keys share a large mean, most of it in a few low-frequency rotary pairs;
- tokens repeat (Zipf), come in topics, and neighbours resemble each other;
- a query looks for the content of other tokens, and has most of its energy in directions where
  keys vary little, so queries lie far outside the keys' distribution (RetrievalAttention, arXiv
  2409.10516, section 2.4);
- both carry rotary embeddings; content sits in the slow pairs;
- logits are scaled until a head's top 1/32 of keys holds a given share of its attention mass.

`structured` has a decaying key spectrum, as most heads have; `hard` has an almost flat one, where
neither codes of few dimensions nor graphs have structure to use; with `ood`, queries lie far from
the keys by their direction alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longreach.types import BFLOAT16, FloatArray, StorageArray

VOCABULARY = 16_384
SINK_TOKENS = 4
WINDOW_TOKENS = 640
ROPE_BASE = 5e5
ROPE_LONGEST_TRAINED = 8192
ROPE_STRETCH = 8.0


@dataclass(frozen=True, slots=True)
class Workload:
    """One KV head and the query heads of its group.

    keys, values [n, head_dim] bfloat16; decode_queries [group, steps, head_dim] fp32: queries of
    the tokens right after the context; prefill_queries [group, m, head_dim] fp32 and their
    positions [m]: a sample of the context's own queries.
    """

    name: str
    keys: StorageArray
    values: StorageArray
    decode_queries: FloatArray
    prefill_queries: FloatArray
    prefill_positions: np.ndarray

    @property
    def scale(self) -> float:
        """1 / sqrt(head_dim)."""
        return float(self.keys.shape[1] ** -0.5)


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Shape of a head: how many content directions and how unevenly energy is spread over them."""

    content_dims: int
    decay: float
    key_energy: FloatArray
    query_energy: FloatArray


def structured_spectrum(head_dim: int) -> Spectrum:
    """Decaying spectrum over half the dimensions; energy in the slow rotary pairs."""
    pair = np.arange(head_dim // 2) * (128 / head_dim)
    key = 0.25 + 1.1 / (1 + np.exp(-(pair - 36) / 5))
    query = 0.18 + 1.6 / (1 + np.exp(-(pair - 40) / 4))
    return Spectrum(head_dim // 2, 0.25, _both(key), _both(query))


def hard_spectrum(head_dim: int) -> Spectrum:
    """Almost flat spectrum of keys over most of the dimensions."""
    pair = np.arange(head_dim // 2) * (128 / head_dim)
    fast = np.where(pair < 20, 0.3, 1.0)
    query = 0.8 + 0.4 * (0.18 + 1.6 / (1 + np.exp(-(pair - 40) / 4)))
    key = np.full(len(pair), 0.9)
    return Spectrum(head_dim * 7 // 8, 0.05, _both(key), _both(query * fast))


def out_of_distribution_spectrum(head_dim: int) -> Spectrum:
    """Keys vary little in a third of the dimensions, and queries point there.

    Queries have energy where keys lack it, as much as makes both matter to logits. At equal length
    they then lie over ten times farther from the keys' distribution than keys do, as
    RetrievalAttention measured on large models, and what groups keys says little about what a query
    looks for.
    """
    pair = np.arange(head_dim // 2) * (128 / head_dim)
    weak = (pair >= 36) & (pair < 53)
    strong = pair >= 53
    key = np.where(weak, 0.05, np.where(strong, 1.35, 0.25))
    query = np.where(weak, 1.6, np.where(strong, 0.06, 0.05))
    return Spectrum(head_dim // 2, 0.25, _both(key), _both(query))


def _both(pairs: np.ndarray) -> FloatArray:
    return np.concatenate([pairs, pairs]).astype(np.float32)


SPECTRA = {
    "structured": structured_spectrum,
    "hard": hard_spectrum,
    "ood": out_of_distribution_spectrum,
}


def workload(
    n: int,
    *,
    name: str = "structured",
    head_dim: int = 128,
    group: int = 4,
    steps: int = 64,
    prefill: int = 16_384,
    mass: float = 0.90,
    seed: int = 0,
) -> Workload:
    """A head over `n` keys whose top 1/32 of keys hold about `mass` of the attention.

    `steps` decode queries and at most `prefill` prefill queries a head; same seed, same arrays.
    """
    rng = np.random.default_rng(seed)
    spectrum = SPECTRA[name](head_dim)
    length = SINK_TOKENS + n + WINDOW_TOKENS + steps
    text = _Text.draw(length, spectrum, rng)
    positions = np.arange(length)
    basis = np.linalg.qr(rng.standard_normal((head_dim, spectrum.content_dims)))[0]
    gains = np.arange(1, spectrum.content_dims + 1) ** -spectrum.decay
    hidden = text.hidden(rng)
    mean = _key_mean(spectrum, rng)
    keys = mean + 2.2 * hidden @ ((basis * gains).T * spectrum.key_energy).astype(np.float32)
    keys += 0.2 * spectrum.key_energy * rng.standard_normal(keys.shape, np.float32)
    keys = rotate(keys, positions)[SINK_TOKENS : SINK_TOKENS + n]
    mixing = rng.standard_normal((spectrum.content_dims, head_dim)) / spectrum.content_dims**0.5
    values = hidden @ mixing.astype(np.float32)
    values += 0.3 * rng.standard_normal(values.shape, np.float32)
    asked = np.sort(rng.choice(np.arange(n // 20, n), min(prefill, n - n // 20), replace=False))
    decode, sampled = [], []
    for g in range(group):
        queries = _queries(text, spectrum, basis, mean, rng, 0.1 * g)
        queries = rotate(queries, positions)
        recent = queries[-steps:]
        sharpness = _sharpness(recent[:32], keys, min(0.97, mass + 0.03 * (g - 1)))
        decode.append(recent * sharpness)
        sampled.append(queries[SINK_TOKENS + asked] * sharpness)
    return Workload(
        name,
        np.ascontiguousarray(keys).astype(BFLOAT16),
        np.ascontiguousarray(values[SINK_TOKENS : SINK_TOKENS + n]).astype(BFLOAT16),
        np.stack(decode).astype(np.float32),
        np.stack(sampled).astype(np.float32),
        asked.astype(np.int64),
    )


@dataclass(frozen=True, slots=True)
class _Text:
    """Latent content of a token sequence: identities, topics and slowly drifting local context."""

    tokens: np.ndarray
    identity: FloatArray
    topic: FloatArray
    local: FloatArray
    successor: np.ndarray

    @classmethod
    def draw(cls, length: int, spectrum: Spectrum, rng: np.random.Generator) -> _Text:
        dims = spectrum.content_dims
        gains = (np.arange(1, dims + 1) ** -spectrum.decay).astype(np.float32)
        segments = max(8, length // 700)
        ends = np.cumsum(rng.dirichlet(np.ones(segments)))
        segment = np.searchsorted(ends[:-1], np.arange(length) / length)
        topics = max(16, segments // 6)
        topic = rng.integers(0, topics, segments)[segment]
        zipf = 1 / np.arange(1, VOCABULARY + 1) ** 1.05
        tokens = rng.choice(VOCABULARY, length, p=zipf / zipf.sum())
        of_topic = rng.integers(0, VOCABULARY, (topics, 96))
        bursty = rng.random(length) < 0.35
        rank = np.minimum(rng.geometric(0.05, int(bursty.sum())) - 1, 95)
        tokens[bursty] = of_topic[topic[bursty], rank]
        return cls(
            tokens,
            rng.standard_normal((VOCABULARY, dims), np.float32) * gains,
            rng.standard_normal((topics, dims), np.float32)[topic],
            _drift(length, dims, 0.97, rng),
            rng.permutation(VOCABULARY),
        )

    def hidden(self, rng: np.random.Generator) -> FloatArray:
        """What each token is [length, content_dims]."""
        mixed = 0.8 * self.identity[self.tokens] + 0.45 * self.topic + 0.45 * self.local
        mixed += np.float32(0.35) * rng.standard_normal(mixed.shape, np.float32)
        return np.asarray(mixed, np.float32)

    def sought(self, rng: np.random.Generator, breadth: float) -> FloatArray:
        """What each token looks for: its successor's identity or its own, in its topic."""
        associated = rng.random(len(self.tokens)) < 0.6
        wanted = np.where(associated, self.successor[self.tokens], self.tokens)
        mixed = (0.9 - breadth) * self.identity[wanted] + (0.35 + breadth) * self.topic
        mixed += 0.3 * self.local
        mixed += np.float32(0.35) * rng.standard_normal(mixed.shape, np.float32)
        return np.asarray(mixed, np.float32)


def _drift(length: int, dims: int, memory: float, rng: np.random.Generator) -> FloatArray:
    """First-order autoregressive noise of unit variance, by doubling the filter's reach."""
    state = rng.standard_normal((length, dims), np.float32) * np.float32((1 - memory**2) ** 0.5)
    reach, factor = 1, memory
    while reach < length and factor > 1e-6:
        state[reach:] = state[reach:] + np.float32(factor) * state[:-reach]
        reach, factor = reach * 2, factor * factor
    return state


def _key_mean(spectrum: Spectrum, rng: np.random.Generator) -> FloatArray:
    """The mean all keys share: a few slow rotary pairs carry values far above the rest."""
    half = len(spectrum.key_energy) // 2
    mean = 0.35 * spectrum.key_energy * rng.standard_normal(2 * half)
    mean[: half * 5 // 8] = 0
    mean[half : half + half * 5 // 8] = 0
    outliers = half - 1 - rng.choice(max(4, half // 6), 4, replace=False)
    mean[outliers] += 7 * rng.choice([-1, 1], 4)
    mean[half + outliers] += 5 * rng.choice([-1, 1], 4)
    return mean.astype(np.float32)


def _queries(
    text: _Text,
    spectrum: Spectrum,
    basis: np.ndarray,
    key_mean: FloatArray,
    rng: np.random.Generator,
    breadth: float,
) -> FloatArray:
    """Queries before rotation [length, head_dim]: the keys' basis, weak directions raised."""
    dims = spectrum.content_dims
    raised = np.arange(1, dims + 1) ** 0.15 * (0.6 + 0.8 * rng.random(dims))
    other = np.linalg.qr(rng.standard_normal(basis.shape))[0]
    projection = ((0.85 * basis * raised + 0.9 * other).T * spectrum.query_energy) * 1.6
    mean = -0.08 * key_mean * (0.5 + rng.random())
    mean = mean + 0.5 * spectrum.query_energy * rng.standard_normal(len(mean))
    mean = mean - 0.9 * basis @ (basis.T @ mean)
    queries = mean.astype(np.float32) + text.sought(rng, breadth) @ projection.astype(np.float32)
    noise = 0.45 * spectrum.query_energy * rng.standard_normal(queries.shape, np.float32)
    return np.asarray(queries + noise, np.float32)


def rotate(x: FloatArray, positions: np.ndarray) -> FloatArray:
    """Rotary embedding of x [length, head_dim], the longest wavelengths stretched as in Llama 3."""
    half = x.shape[1] // 2
    frequency = ROPE_BASE ** (-np.arange(half) / half)
    frequency = np.where(
        2 * np.pi / frequency > ROPE_LONGEST_TRAINED, frequency / ROPE_STRETCH, frequency
    )
    turned = np.empty_like(x)
    for start in range(0, len(x), 65_536):
        part = slice(start, start + 65_536)
        angle = positions[part, None] * frequency
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        left, right = x[part, :half], x[part, half:]
        turned[part, :half] = left * cos - right * sin
        turned[part, half:] = right * cos + left * sin
    return turned


def _sharpness(queries: FloatArray, keys: FloatArray, mass: float) -> float:
    """Factor on queries at which the median query's top 1/32 of keys hold `mass` of attention."""
    logits = np.sort(queries @ keys.T / keys.shape[1] ** 0.5, axis=1)[:, ::-1]
    top = max(1, keys.shape[0] // 32)
    low, high = 0.02, 20.0
    for _ in range(16):
        factor = (low * high) ** 0.5
        weights = np.exp((logits - logits[:, :1]) * factor)
        if np.median(weights[:, :top].sum(1) / weights.sum(1)) < mass:
            low = factor
        else:
            high = factor
    return float((low * high) ** 0.5)
