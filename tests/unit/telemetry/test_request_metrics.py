"""What a coordinator counts of one generation."""

from __future__ import annotations

import asyncio

import pytest

from coordinator import request_metrics
from coordinator.generation import FinishReason
from coordinator.request_metrics import Objectives, RequestMetrics
from coordinator.summary import Summary
from longreach.errors import ResourceExhausted, Unavailable
from longreach.steps import StepTiming
from longreach.types import WorkFigures
from tests.unit.telemetry.measured import measured

OBJECTIVES = Objectives(ttft_s=1.0, itl_s=0.1)


def summary(work: WorkFigures | None = None) -> Summary:
    return Summary(
        finish_reason=FinishReason.LENGTH,
        context_tokens=100,
        prompt_tokens=7,
        completion_tokens=3,
        queue_s=0.25,
        open_s=0.0,
        first_token_s=0.0,
        per_token_s=0.0,
        steps=StepTiming(),
        work=work or WorkFigures(),
        prompt_work=WorkFigures(),
        coverage=1.0,
        resident_kv_bytes=0,
        full_kv_bytes=0,
        worker_id="w",
        index_kinds=(),
        failovers=0,
        recomputed_tokens=0,
        hedged_requests=0,
        resumed=0,
    )


def served(times: list[float], *, resumed: bool = False, work: WorkFigures | None = None) -> None:
    """A request that arrived at 10 and whose tokens came at these times."""
    metrics = RequestMetrics("m", 10.0, OBJECTIVES, resumed=resumed)
    for at in times:
        metrics.token(at, 0.25)
    metrics.finished(summary(work), times[-1])


@pytest.mark.parametrize(
    ("times", "within"),
    [
        ([10.9, 11.0, 11.1], 1),
        ([11.1, 11.2, 11.3], 0),
        ([10.5, 10.6, 10.8], 0),
        ([10.5, 10.51, 10.69], 1),  # the mean counts
        ([10.5], 1),
    ],
)
def test_a_request_is_good_when_both_objectives_were_kept(times: list[float], within: int) -> None:
    with measured("coordinator") as read:
        served(times)
        assert read("requests_within_objectives", model_name="m") == within
        assert read("request_success", finished_reason="length") == 1
        assert read("generation_tokens") == len(times)
        assert read("inter_token_latency_seconds") == len(times) - 1
        assert read("time_to_first_token_seconds") == 1
        assert read("prompt_tokens") == 7


def test_of_a_request_that_began_elsewhere_only_its_tokens_are_judged() -> None:
    with measured("coordinator") as read:
        served([15.0, 15.05], resumed=True)
        assert read("time_to_first_token_seconds") == 0
        assert read("e2e_request_latency_seconds") == 0
        assert read("requests_within_objectives") == 1


def test_fractions_are_those_of_requests_that_retrieved_something() -> None:
    with measured("coordinator") as read:
        served([10.1])
        assert read("retrieval_scan_fraction") == 0
        served([10.1], work=WorkFigures(keys_in_scope=100, keys_scanned=5, keys_attended=4))
        assert read("retrieval_scan_fraction") == read("retrieval_attended_fraction") == 1
        assert read("kv_coverage_ratio") == 2


def test_failures_are_counted_by_status() -> None:
    with measured("coordinator") as read:
        request_metrics.failed(ResourceExhausted("full"))
        request_metrics.failed(Unavailable("gone"))
        request_metrics.failed(asyncio.CancelledError())
        request_metrics.failed(GeneratorExit())
        request_metrics.failed(KeyError("a bug"))
        counted = {
            code: read("request_failure", code=code)
            for code in ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "CANCELLED", "INTERNAL")
        }
    assert counted == {
        "RESOURCE_EXHAUSTED": 1, "UNAVAILABLE": 1, "CANCELLED": 2, "INTERNAL": 1
    }  # fmt: skip
