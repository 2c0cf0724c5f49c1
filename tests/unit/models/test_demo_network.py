from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

from models.export import load_checkpoint, to_qwen3
from models.longcontext import LongContext
from models.optimizer import Muon, orthogonalised
from models.primed import DemoConfig, DemoModel, dilution_mask
from models.priming import prime
from models.sequences import TrainingText, make_batch
from models.tokenizer import VOCAB_SIZE
from models.train import Schedule, Trainer, TrainSettings, pick_supervised_rows


@pytest.fixture(scope="module")
def primed() -> DemoModel:
    torch.manual_seed(0)
    model = DemoModel(DemoConfig())
    prime(model)
    return model.eval()


def random_ids(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (1, count), generator=generator)


@torch.no_grad()
def test_primed_first_layer_heads_look_one_to_four_tokens_back(primed: DemoModel) -> None:
    ids = random_ids(64)
    layer = primed.layers[0]
    x = layer.input_layernorm(primed.embed_tokens(ids))
    rotation = primed.rotation(torch.arange(64)[None], x.dtype)
    q, k, _ = layer.self_attn.queries_keys_values(x, rotation)
    for head in range(4):
        logits = q[0, head, 10:] @ k[0, head // 2].t()
        causal = torch.arange(64)[None] <= torch.arange(10, 64)[:, None]
        found = logits.masked_fill(~causal, -math.inf).argmax(-1)
        offsets = torch.arange(10, 64) - found
        assert (offsets == head + 1).float().mean() > 0.9


@torch.no_grad()
def test_primed_last_layer_prefers_the_token_after_an_earlier_occurrence(
    primed: DemoModel,
) -> None:
    """Median rank of the place that induction wants, among all earlier places."""
    ids = random_ids(100).repeat(1, 2)
    x = primed.embed_tokens(ids)
    rotation = primed.rotation(torch.arange(200)[None], x.dtype)
    *lower, last = primed.layers
    for block in lower:
        x = block(x, rotation, None)
    q, k, _ = last.self_attn.queries_keys_values(last.input_layernorm(x), rotation)
    queries = torch.arange(110, 190)
    logits = (q[0, 0, queries] @ k[0, 0, :100].t()).float()
    wanted = logits.gather(1, (queries - 99)[:, None])
    assert (logits > wanted).sum(-1).float().median() < 20  # chance is 50


@torch.no_grad()
def test_export_gives_the_training_networks_logits(primed: DemoModel) -> None:
    ids = random_ids(300, seed=1)
    ours = primed.logits(primed(ids))
    qwen3 = to_qwen3(primed)
    qwen3.set_attn_implementation("eager")
    theirs = qwen3(ids).logits
    for position in (0, 1, 57, 299):
        torch.testing.assert_close(ours[0, position], theirs[0, position], atol=2e-3, rtol=1e-3)


@torch.no_grad()
def test_supervised_pass_without_neighbours_equals_the_plain_pass(primed: DemoModel) -> None:
    ids = random_ids(64).view(2, 32)
    positions = torch.arange(32).expand(2, 32)
    rows = torch.tensor([[3, 31], [10, 20]])
    with torch.autocast("cpu", torch.bfloat16):
        hidden = primed.forward_supervised(
            ids, positions, torch.zeros(2, 32), rows, torch.full((2,), -math.inf)
        ).float()
    plain = primed(ids, positions)
    expected = plain.gather(1, rows[..., None].expand(-1, -1, plain.shape[-1]))
    # The training pass computes in bfloat16.
    similarity = torch.cosine_similarity(hidden, expected, dim=-1)
    assert similarity.min() > 0.99


def test_a_dilution_of_log_m_counts_a_token_m_times() -> None:
    length, many = 40, 5
    dilution = torch.zeros(1, length)
    dilution[0, 2] = math.log(many)
    mask = dilution_mask(dilution)[0, 0]
    logits = torch.randn(length, generator=torch.Generator().manual_seed(2))
    weights = torch.softmax(logits + mask[-1], -1)
    repeated = torch.cat((logits, logits[2].repeat(many - 1)))
    expected = torch.softmax(repeated, -1)
    torch.testing.assert_close(weights[2], expected[2] * many)
    assert mask[2 + 31, 2] == 0  # nearer than 32 tokens it counts once
    assert mask[0, 1] == -math.inf


@torch.no_grad()
def test_chunked_prefill_predicts_as_one_forward_does(primed: DemoModel) -> None:
    qwen3 = to_qwen3(primed)
    ids = random_ids(150).repeat(1, 2)[0].tolist()
    session = LongContext(qwen3, 512)
    session.prefill(ids[:250], chunk_tokens=64)
    predicted = session.predict(ids[250:])
    expected = qwen3(torch.tensor([ids])).logits[0, 250:].argmax(-1).tolist()
    assert predicted == expected
    assert session.length == 250
    with pytest.raises(ValueError, match="513 tokens exceed"):
        session.prefill([5] * 263)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    matrices = torch.randn(2, 24, 48, generator=torch.Generator().manual_seed(3))
    values = torch.linalg.svdvals(orthogonalised(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_muon_refuses_the_state_of_another_model() -> None:
    muon = Muon([torch.nn.Parameter(torch.zeros(4, 3))])
    with pytest.raises(ValueError, match="Muon state has shapes"):
        muon.load_state_dict([torch.zeros(1, 5, 3)])


def test_rows_point_one_token_before_each_target(text: TrainingText) -> None:
    batch = make_batch(4, 256, random.Random(0), text, 1.0, 0.25)
    rows, valid = pick_supervised_rows(batch, random.Random(0))
    assert rows.shape == valid.shape
    assert rows.shape[1] <= 96
    for index in range(4):
        for row in rows[index][valid[index]].tolist():
            assert batch.supervised[index, row + 1]


def test_a_resumed_run_takes_the_same_steps(tmp_path: Path, text: TrainingText) -> None:
    settings = TrainSettings(out=tmp_path, steps=4, ranks=1)
    straight = Trainer(settings, 0, text)
    losses = [straight.step(Schedule(step / 4)).loss for step in range(2)]

    stopped = Trainer(settings, 0, text)
    stopped.step(Schedule(0.0))
    stopped.save(tmp_path / "checkpoint.pt")
    resumed = Trainer(settings, 0, text)
    resumed.load(tmp_path / "checkpoint.pt")
    assert resumed.step_count == 1
    assert resumed.step(Schedule(1 / 4)).loss == pytest.approx(losses[1], rel=1e-3)
    assert load_checkpoint(tmp_path / "checkpoint.pt").config == straight.model.config


def test_a_checkpoint_of_another_seed_is_refused(tmp_path: Path, text: TrainingText) -> None:
    Trainer(TrainSettings(out=tmp_path), 0, text).save(tmp_path / "checkpoint.pt")
    other = Trainer(TrainSettings(out=tmp_path, seed=1), 0, text)
    with pytest.raises(ValueError, match="trained with seed 0, not 1"):
        other.load(tmp_path / "checkpoint.pt")


def test_the_schedule_ramps_dilution_up_and_the_rate_down() -> None:
    shares = [i / 20 for i in range(21)]
    multiplicities = [Schedule(share).multiplicity_max for share in shares]
    assert multiplicities == sorted(multiplicities)
    assert (multiplicities[0], round(multiplicities[-1])) == (1.0, 600)
    assert Schedule(1.0).lr_factor == pytest.approx(0.02)
