"""Muon: momentum whose update is orthogonalised, for the matrices inside the layers.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). Embeddings and
norms are left to Adam.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5


class Muon:
    """Muon over matrices, batched by shape.

    parameters: matrices. momentum: share of the old average kept each step. weight_decay: decay
    per unit of learning rate.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        momentum: float = 0.95,
        weight_decay: float = 0.02,
    ) -> None:
        by_shape: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            by_shape[tuple(parameter.shape)].append(parameter)
        self._groups = list(by_shape.values())
        self._averages = [torch.zeros(len(g), *g[0].shape) for g in self._groups]
        self._momentum = momentum
        self._weight_decay = weight_decay

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Applies the gradients at learning rate `lr`."""
        for group, average in zip(self._groups, self._averages, strict=True):
            gradients = torch.stack([p.grad for p in group if p.grad is not None])
            average.lerp_(gradients, 1 - self._momentum)
            looked_ahead = gradients.lerp(average, self._momentum)
            rows, columns = group[0].shape
            updates = orthogonalised(looked_ahead) * max(1.0, rows / columns) ** 0.5
            for parameter, update in zip(group, updates, strict=True):
                parameter.mul_(1 - self._weight_decay * lr).sub_(update, alpha=lr)

    def state_dict(self) -> list[Tensor]:
        """The momentum averages, one stacked tensor per shape."""
        return self._averages

    def load_state_dict(self, averages: list[Tensor]) -> None:
        """Restores `state_dict()`.

        Raises ValueError if the matrices are not those the state was saved from.
        """
        shapes = [tuple(a.shape) for a in self._averages]
        given = [tuple(a.shape) for a in averages]
        if shapes != given:
            raise ValueError(f"Muon state has shapes {given}, the model needs {shapes}")
        self._averages = averages


def orthogonalised(matrices: Tensor) -> Tensor:
    """Each matrix of [n, rows, columns] with its singular values pushed towards one, float32."""
    a, b, c = _NEWTON_SCHULZ
    x = matrices.bfloat16()
    is_wide = x.shape[1] > x.shape[2]
    if is_wide:
        x = x.transpose(1, 2)
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x.transpose(1, 2) @ x
        x = a * x + x @ (b * gram + c * gram @ gram)
    return (x.transpose(1, 2) if is_wide else x).float()
