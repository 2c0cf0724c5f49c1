"""`recall`: how few columns hold a head's attention, and whether they are the same in every prompt.

For some rows of the prompt's second half, the recall is the share of a row's attention mass on its
own k heaviest columns (MInference 1.0, figure 2a), and on the k heaviest columns that the row at
the same place has in another prompt of the same length (figure 2b). Where the first is high and the
second is low, attention is sparse, but which columns matter has to be found anew for every prompt.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from benchmarks.report import Report
from evaluation.encoding import load_encoder
from evaluation.fingerprint import model_fingerprint
from evaluation.observations.reporting import Row, finish, mean_over
from evaluation.prefill_figures.plots import plot_recall
from evaluation.prefill_figures.prompts import each_layer, make_prompts
from gpu_worker.model import load_model
from gpu_worker.pattern_search.capture import LayerTensors


def run(given: argparse.Namespace) -> None:
    """Measures and writes recall.json, recall.csv and recall.png."""
    model = load_model(given.model)
    prompts = make_prompts(load_encoder(given.model), given.tokens, max(2, given.prompts))
    config = {
        "model": model_fingerprint(given.model), "tokens": given.tokens, "rows": given.rows,
        "shares": given.shares, "prompts": [name for name, _ in prompts],
    }  # fmt: skip
    report = Report("recall", config)
    before: dict[int, tuple[str, Tensor]] = {}

    def visit(name: str, tensors: LayerTensors) -> None:
        masses = row_masses(tensors, given.rows)
        for share in given.shares:
            k = max(1, round(share * tensors.tokens))
            own = recall(masses, masses, k)
            other = before.get(tensors.layer)
            reused = None if other is None else recall(masses, other[1], k)
            for head in range(len(own)):
                report.add(
                    prompt=name, layer=tensors.layer, q_head=head, share=share, k=k,
                    recall=float(own[head]),
                    **({} if other is None or reused is None
                       else {"reused_from": other[0], "reused_recall": float(reused[head])}),
                )  # fmt: skip
        before[tensors.layer] = (name, masses)

    each_layer(model, prompts, visit)
    plot_recall(report.results, given.out / "recall.png")
    finish(report, given.out, {"recall, mean over heads and prompts": summary(report.results)})


def summary(rows: list[Row]) -> list[Row]:
    """Per layer and share: recall of a row's own columns and of another prompt's."""
    both = [row for row in rows if "reused_recall" in row]
    return mean_over(both, ("layer", "share"), ("recall", "reused_recall"))


def row_masses(tensors: LayerTensors, rows: int) -> Tensor:
    """Attention of `rows` rows spread over the prompt's second half: fp32 [q_heads, rows, n]."""
    n = tensors.tokens
    at = torch.linspace(n // 2, n - 1, min(rows, n - n // 2)).long().to(tensors.q.device)
    group = tensors.q.shape[0] // tensors.k.shape[0]
    masses = []
    for head in range(tensors.q.shape[0]):
        logits = tensors.q[head, at].float() @ tensors.k[head // group].float().T * tensors.scale
        future = torch.arange(n, device=at.device) > at[:, None]
        masses.append(logits.masked_fill(future, -torch.inf).softmax(-1))
    return torch.stack(masses)


def recall(masses: Tensor, chosen_by: Tensor, k: int) -> Tensor:
    """Mean over rows of the mass on the k columns that `chosen_by` is heaviest on: [q_heads].

    Both [q_heads, rows, n], of rows at the same positions.
    """
    columns = chosen_by.topk(min(k, chosen_by.shape[-1]), dim=-1).indices
    return masses.gather(-1, columns).sum(-1).mean(-1)
