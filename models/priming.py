"""Induction-primed initialisation: the parts of a copying circuit are in place from the start.

Layer 0 gets previous-token heads, made of RoPE phases; the layers between get local heads; the last
layer compares "this token" (query) with "the previous token" (key) in the RoPE pairs that barely
turn over 128K positions, and copies what it finds through an identity from values to the output.
The parts alone answer nothing yet (the right token's median rank among 5,760 is about 1,100 on a
text seen twice); within a hundred steps of training they do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.primed import Attention, DemoModel, rope_frequencies

_FIRST_LAYER_OFFSETS = (1, 2, 3, 4)
_FIRST_LAYER_GAINS = (1.2, 0.7, 0.4, 0.3)
_MIDDLE_OFFSETS = (1, 5, 7, 8)
_MIDDLE_GAINS = (0.2, 0.3, 0.3, 0.3)
_LOOK_BACK_GAIN = 0.7
_HORIZON = 131_072
_SLOW_TURN_MAX = 0.7


@dataclass(frozen=True)
class _HeadCircuit:
    """What one query head writes for a token: `output @ value @ x`."""

    output: Tensor
    value: Tensor


@torch.no_grad()
def prime(model: DemoModel, seed: int = 1) -> None:
    """Overwrites `model`'s weights in place with the primed initialisation."""
    generator = torch.Generator().manual_seed(seed)
    shared = _prime_embeddings(model, generator)
    first = model.layers[0].self_attn
    circuits = _prime_local_heads(
        first, model, shared, _FIRST_LAYER_OFFSETS, _FIRST_LAYER_GAINS, 0.05, generator
    )
    look_back = [circuits[3]]
    for block in list(model.layers)[1:-1]:
        middle = _prime_local_heads(
            block.self_attn, model, shared, _MIDDLE_OFFSETS, _MIDDLE_GAINS, 0.4, generator
        )
        look_back += middle[1:]
    _prime_matching(model, shared, circuits, look_back, generator)
    for block in model.layers:
        block.mlp.down_proj.weight.mul_(0.3)
    model.norm.weight.fill_(3.0)


def _prime_embeddings(model: DemoModel, generator: torch.Generator) -> Tensor:
    """Random embeddings plus one direction all tokens share; returns it as a unit vector."""
    config = model.config
    direction = torch.randn(config.hidden, generator=generator)
    unit = direction / direction.norm()
    noise = torch.randn(config.vocab_size, config.hidden, generator=generator) * 0.5
    model.embed_tokens.weight.copy_(noise + unit * math.sqrt(config.hidden) * 0.5)
    return unit


def _prime_local_heads(
    attention: Attention,
    model: DemoModel,
    shared: Tensor,
    offsets: tuple[int, ...],
    gains: tuple[float, ...],
    noise: float,
    generator: torch.Generator,
) -> list[_HeadCircuit]:
    """Makes head h attend `offsets[h]` tokens back, whatever the tokens are.

    All keys carry one constant vector, read from the shared direction; the query carries the same
    vector turned back by the offset, so RoPE makes the product peak there.
    """
    config = model.config
    frequencies = rope_frequencies(config)
    amplitude = torch.zeros_like(frequencies)
    amplitude[frequencies > 0.007] = 1.0
    amplitude[(frequencies <= 0.007) & (frequencies > 1e-4)] = 0.5

    def constant(vector: Tensor) -> Tensor:
        jitter = torch.randn(config.head_dim, config.hidden, generator=generator)
        return torch.outer(vector, shared) + noise * jitter / math.sqrt(config.hidden)

    key_vector = torch.cat((amplitude, torch.zeros_like(amplitude)))
    keys = [constant(key_vector) for _ in range(config.kv_heads)]
    queries = []
    for offset in offsets:
        phase = -offset * frequencies
        queries.append(constant(torch.cat((amplitude * phase.cos(), amplitude * phase.sin()))))
    values = [
        _orthogonal(config.head_dim, config.hidden, generator) for _ in range(config.kv_heads)
    ]
    outputs = [_orthogonal(config.hidden, config.head_dim, generator) * gain for gain in gains]
    attention.q_proj.weight.copy_(torch.cat(queries))
    attention.k_proj.weight.copy_(torch.cat(keys))
    attention.v_proj.weight.copy_(torch.cat(values))
    attention.o_proj.weight.copy_(torch.cat(outputs, 1))
    attention.q_norm.weight.fill_(2.0)
    attention.k_norm.weight.fill_(2.0)
    return [
        _HeadCircuit(output, values[head // config.group]) for head, output in enumerate(outputs)
    ]


def _prime_matching(
    model: DemoModel,
    shared: Tensor,
    circuits: list[_HeadCircuit],
    look_back: list[_HeadCircuit],
    generator: torch.Generator,
) -> None:
    """The last layer: query "this token and the one before" meets key "the two tokens before".

    Half of the heads copy the token they find. The others copy what the local heads `look_back`
    fetched for it, a token some places earlier: variable tracking asks for the name that stands
    before the matching value, and that circuit did not form by itself in the same budget.
    """
    config = model.config
    attention = model.layers[-1].self_attn
    frequencies = rope_frequencies(config)
    slow = frequencies * _HORIZON < _SLOW_TURN_MAX
    rows = torch.cat((slow, slow)).nonzero().flatten()
    without_shared = torch.eye(config.hidden) - torch.outer(shared, shared)
    previous, second = circuits[0], circuits[1]
    gain, second_gain = _FIRST_LAYER_GAINS[:2]

    queries, keys = [], []
    for _ in range(config.kv_heads):
        basis = _orthogonal(len(rows), config.head_dim, generator)
        read_previous = basis @ previous.output.t() / gain
        key = torch.randn(config.head_dim, config.hidden, generator=generator) * 0.01
        read_second = basis @ second.output.t() / second_gain
        key[rows] += (read_previous + 0.5 * read_second) @ without_shared
        keys.append(key)
        for _ in range(config.group):
            query = torch.randn(config.head_dim, config.hidden, generator=generator) * 0.01
            one_back = basis @ second.value @ previous.value.t() @ previous.output.t() / gain
            query[rows] += (basis @ previous.value + 0.5 * one_back) @ without_shared
            queries.append(query)
    attention.q_proj.weight.copy_(torch.cat(queries))
    attention.k_proj.weight.copy_(torch.cat(keys))

    value = _orthogonal(config.kv_heads * config.head_dim, config.hidden, generator)
    attention.v_proj.weight.copy_(value)
    per_head = value.view(config.kv_heads, config.head_dim, config.hidden)
    recall = torch.zeros(config.hidden, config.hidden)
    for circuit in look_back:
        fetched = circuit.value.t() @ circuit.output.t() / circuit.output.norm(2, 0).mean()
        recall += _LOOK_BACK_GAIN * fetched
    outputs = []
    for head in range(config.heads):
        read = per_head[head // config.group].t()
        outputs.append(recall @ read if head % config.group else 1.5 * read)
    attention.o_proj.weight.copy_(torch.cat(outputs, 1))
    attention.q_norm.weight.fill_(2.0)
    attention.k_norm.weight.fill_(2.0)


def _orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A random [rows, columns] matrix with orthonormal rows or columns, whichever are fewer."""
    tall = torch.randn(max(rows, columns), min(rows, columns), generator=generator)
    basis: Tensor = torch.linalg.qr(tall)[0]
    return basis if rows >= columns else basis.t()
