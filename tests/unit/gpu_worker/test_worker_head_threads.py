"""KV heads side by side: order, errors, torch's threads and its inference mode."""

from __future__ import annotations

import threading

import pytest
import torch

from gpu_worker.head_threads import for_each_head

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 4, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_heads(threads):
    assert for_each_head(lambda head: head * head, 7, CPU) == [0, 1, 4, 9, 16, 25, 36]


def test_heads_share_torchs_threads_and_leave_the_callers_alone(threads):
    together = threading.Barrier(2)

    def work(head):
        if threads > 1:
            together.wait(30)  # fails unless both heads run at once
        return torch.get_num_threads()

    assert set(for_each_head(work, 2, CPU)) == {max(1, threads // 2)}
    assert torch.get_num_threads() == threads
    seen = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [threads]


def test_the_callers_inference_mode_holds_in_every_head(threads):
    with torch.inference_mode():
        made = torch.zeros(3)

        def work(head):
            made[head] = head + 1  # an error outside of inference mode
            return torch.is_inference_mode_enabled()

        assert for_each_head(work, 3, CPU) == [True, True, True]
    assert made.tolist() == [1, 2, 3]
    assert for_each_head(lambda head: torch.is_inference_mode_enabled(), 2, CPU) == [False, False]


def test_the_first_error_is_raised_when_all_heads_have_ended(threads):
    ended = []

    def work(head):
        if head in (1, 2):
            raise ValueError(f"head {head}")
        ended.append(head)

    with pytest.raises(ValueError, match="head 1"):
        for_each_head(work, 4, CPU)
    if threads > 1:
        assert sorted(ended) == [0, 3]
