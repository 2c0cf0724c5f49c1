"""Checks of requests that need no cluster: each names the value, the limit and the way out."""

from __future__ import annotations

import pytest
from coordinator_doubles import model_info

from coordinator.config import CoordinatorConfig
from coordinator.requests import GenerateParams, Prompt, answer_tokens, check_generate, choose_model
from longreach.errors import InvalidRequest, NotFound, Unavailable
from longreach.types import Budget, SamplingParams

TINY, OTHER = model_info(), model_info(model="other")
PROMPT = Prompt("x")


def _params(**fields):
    return GenerateParams(PROMPT, **fields)


@pytest.mark.parametrize(
    ("sampling", "word"),
    [
        (SamplingParams(temperature=float("nan")), "nan"),
        (SamplingParams(temperature=float("inf")), "inf"),
        (SamplingParams(temperature=-0.5), "-0.5"),
        (SamplingParams(top_p=float("nan")), "nan"),
        (SamplingParams(top_p=1.01), "1.01"),
        (SamplingParams(top_k=-1), "-1"),
    ],
)
def test_bad_sampling_values_are_named(sampling, word):
    with pytest.raises(InvalidRequest, match=word):
        check_generate(_params(sampling=sampling))


def test_good_requests_pass():
    check_generate(_params())
    check_generate(
        _params(
            sampling=SamplingParams(0.7, 0.9, 40, 1),
            stop_texts=("a" * 256,) * 16,
            min_coverage=1.0,
            top_logprobs=20,
            request_id="r" * 128,
        )
    )


@pytest.mark.parametrize("fields", [{"request_id": "r" * 129}, {"stop_texts": ("a" * 257,)}])
def test_long_names_and_stop_texts_are_refused(fields):
    with pytest.raises(InvalidRequest, match="at most"):
        check_generate(_params(**fields))


def test_the_default_length_shrinks_to_what_fits_and_a_named_one_does_not():
    room = TINY.max_positions - 100 - 10
    assert answer_tokens(_params(), 100, 10, TINY, default=256) == 256
    assert answer_tokens(_params(), 100, 10, TINY, default=10**6) == room
    assert answer_tokens(_params(max_tokens=room), 100, 10, TINY, default=1) == room
    with pytest.raises(InvalidRequest) as caught:
        answer_tokens(_params(max_tokens=room + 1), 100, 10, TINY, default=1)
    assert caught.value.reason == "TOO_LONG"
    for number in (100, 10, room + 1, TINY.max_positions):
        assert str(number) in caught.value.message


def test_a_model_that_is_full_to_the_last_position_is_refused():
    with pytest.raises(InvalidRequest, match="shorten the prompt"):
        answer_tokens(_params(), TINY.max_positions - 10, 10, TINY, default=256)


def test_the_only_model_needs_no_name():
    assert choose_model("", {"tiny": TINY}) is TINY
    assert choose_model("other", {"tiny": TINY, "other": OTHER}) is OTHER


def test_several_models_need_one():
    with pytest.raises(InvalidRequest, match="other, tiny"):
        choose_model("", {"tiny": TINY, "other": OTHER})


def test_an_unknown_model_is_not_found_and_one_whose_workers_are_away_is_unavailable():
    with pytest.raises(NotFound, match="served: tiny"):
        choose_model("other", {"tiny": TINY})
    with pytest.raises(Unavailable, match="other"):
        choose_model("other", {"tiny": TINY}, away={"other"})
    with pytest.raises(Unavailable, match="--coordinators"):
        choose_model("", {})


def test_a_config_that_cannot_work_is_refused_by_name():
    good = CoordinatorConfig(cluster_secret="s")
    assert good.budget() == Budget(top_k=100, tail_estimate=True)
    with pytest.raises(InvalidRequest, match="LONGREACH_CLUSTER_SECRET"):
        CoordinatorConfig()
    with pytest.raises(InvalidRequest, match="default_budget"):
        CoordinatorConfig(cluster_secret="s", default_budget="everything")
    with pytest.raises(InvalidRequest, match="max_waiting is -1"):
        CoordinatorConfig(cluster_secret="s", max_waiting=-1)
    with pytest.raises(InvalidRequest, match="question_step_ms is 0"):
        CoordinatorConfig(cluster_secret="s", question_step_ms=0)
