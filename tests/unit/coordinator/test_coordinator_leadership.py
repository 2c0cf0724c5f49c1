"""The leader acts only while its lease surely holds."""

from __future__ import annotations

from coordinator.catalog.base import Lease
from coordinator.leadership import MARGIN_S, Leadership

TTL_S = 5.0


def test_a_holder_leads_until_shortly_before_its_lease_ends():
    me = Leadership("a")
    assert me.epoch(0.0) == 0
    assert me.answered(Lease("a", 3, TTL_S), asked_at=10.0)
    assert me.epoch(10.0) == me.epoch(10.0 + TTL_S - MARGIN_S - 0.01) == 3
    assert me.epoch(10.0 + TTL_S - MARGIN_S) == 0


def test_the_lease_counts_from_the_request_however_late_the_reply():
    me = Leadership("a")
    me.answered(Lease("a", 1, TTL_S), asked_at=10.0)
    me.answered(Lease("a", 1, TTL_S), asked_at=12.0)
    assert me.epoch(12.0 + TTL_S - MARGIN_S - 0.01) == 1
    assert me.epoch(12.0 + TTL_S - MARGIN_S) == 0


def test_a_renewal_is_no_new_leadership_and_a_return_is():
    me = Leadership("a")
    assert me.answered(Lease("a", 1, TTL_S), 0.0)
    assert not me.answered(Lease("a", 1, TTL_S), 1.0)
    assert not me.answered(Lease("b", 2, TTL_S), 2.0)
    assert me.epoch(2.0) == 0
    assert me.leader == "b"
    assert me.answered(Lease("a", 3, TTL_S), 3.0)
    assert me.epoch(3.0) == 3


def test_the_highest_epoch_is_remembered_even_when_the_storage_forgot_it():
    me = Leadership("a")
    me.answered(Lease("b", 9, TTL_S), 0.0)
    me.answered(Lease("c", 1, TTL_S), 1.0)
    assert me.known_epoch == 9
