from __future__ import annotations

import random

import numpy as np
import pytest

from models.prose import held_out_names, prose_text
from models.sequences import TrainingText, copy_sequence, make_batch, pose_positions, task_sequence
from models.tasks import Sampler
from models.tokenizer import BOS_ID, EOS_ID


def test_supervised_tokens_repeat_what_the_haystack_says(text: TrainingText) -> None:
    """Every supervised answer stands in the part of the sequence before the questions."""
    for seed in range(20):
        drawn = Sampler(random.Random(seed), text.words)
        sequence = task_sequence(512, drawn, text)
        first = sequence.supervised.index(True)
        haystack = text.tokenizer.decode(sequence.ids[:first])
        answers: list[list[int]] = [[]]
        for token, is_target in zip(sequence.ids, sequence.supervised, strict=True):
            if is_target and token != EOS_ID:
                answers[-1].append(token)
            elif answers[-1]:
                answers.append([])
        for answer in filter(None, answers):
            for word in text.tokenizer.decode(answer).rstrip('.">').split():
                assert word in haystack


def test_asked_needles_are_never_diluted_and_questions_come_last(text: TrainingText) -> None:
    for seed in range(20):
        sequence = task_sequence(512, Sampler(random.Random(seed), text.words), text)
        first = sequence.supervised.index(True)
        assert sequence.ids[0] == BOS_ID
        assert not any(sequence.diluted[first:])
        assert len(sequence.ids) == len(sequence.supervised) == len(sequence.diluted)


def test_a_copy_sequence_repeats_its_blocks() -> None:
    sequence = copy_sequence(256, random.Random(1))
    half = (len(sequence.ids) - 1) // 2
    assert sorted(sequence.ids[1 : 1 + half]) == sorted(sequence.ids[1 + half :])
    assert not any(sequence.supervised[: 1 + half])


def test_a_batch_depends_on_its_seed_only(text: TrainingText) -> None:
    first, second = (make_batch(4, 256, random.Random(5), text, 100.0, 0.2) for _ in range(2))
    assert first.tasks == second.tasks
    for name in ("ids", "positions", "supervised", "dilution"):
        assert np.array_equal(getattr(first, name), getattr(second, name))


def test_dilution_stays_below_its_maximum(text: TrainingText) -> None:
    batch = make_batch(8, 256, random.Random(6), text, 600.0, 0.0)
    assert batch.dilution.min() == 0
    assert 0 < batch.dilution.max() <= np.log(600.0)
    assert not batch.dilution[batch.supervised].any()


@pytest.mark.parametrize("seed", range(10))
def test_positions_rise_and_span_at_most_the_limit(seed: int) -> None:
    positions = pose_positions(512, [10, 100, 200, 400], random.Random(seed))
    steps = np.diff(positions)
    assert positions[0] == 0
    assert steps.min() == 1
    assert positions[-1] <= 200_000
    assert {int(i) + 1 for i in np.flatnonzero(steps > 1)} <= {10, 100, 200, 400}


def test_held_out_prose_is_not_in_the_training_prose() -> None:
    train, held_out = (
        {paragraph for paragraph in prose_text(part).split("\n\n") if len(paragraph) > 200}
        for part in (False, True)
    )
    # The documentation itself repeats some paragraphs in several topics.
    assert len(train & held_out) / len(held_out) < 0.08
    assert any(name.startswith("topic:") for name in held_out_names())
