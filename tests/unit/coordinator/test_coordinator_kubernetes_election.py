"""Leader election by a Lease: candidates with clocks of their own and one stored object."""

from __future__ import annotations

import dataclasses

from coordinator.catalog.base import Lease
from coordinator.kubernetes.election import LeaseElection, LeaseObject
from coordinator.leadership import Leadership

DURATION_S = 10.0


class Store:
    """The stored Lease: takes a write of the version it has, as the API server does."""

    def __init__(self) -> None:
        self.lease = LeaseObject()
        self._version = 0

    def write(self, lease: LeaseObject) -> LeaseObject | None:
        if lease.version != self.lease.version:
            return None
        self._version += 1
        self.lease = dataclasses.replace(lease, version=str(self._version))
        return self.lease


def turn(one: LeaseElection, store: Store, now: float, known_epoch: int = 0) -> bool:
    """One look and one write, as the keeper does it; whether it wrote."""
    one.observed(store.lease, now)
    wanted = one.wanted(now, f"t{now}", known_epoch)
    if wanted is None:
        return False
    stored = store.write(wanted)
    if stored is not None:
        one.wrote(stored, now)
    return stored is not None


def test_the_first_candidate_leads_and_the_others_wait() -> None:
    store, a, b = Store(), LeaseElection("a", DURATION_S), LeaseElection("b", DURATION_S)
    assert turn(a, store, 0.0)
    assert not turn(b, store, 0.5)
    assert a.lease(1.0) == Lease("a", 1, 9.0)
    assert b.lease(1.0) == Lease("a", 1, 0.0)


def test_a_lease_that_stood_still_for_its_duration_is_taken_under_a_higher_epoch() -> None:
    store, a, b = Store(), LeaseElection("a", DURATION_S), LeaseElection("b", DURATION_S)
    turn(a, store, 0.0)
    assert not turn(b, store, 5.0)
    assert turn(a, store, 8.0)  # renewed: the wait begins again
    assert not turn(b, store, 12.0)
    assert not turn(b, store, 21.9)
    assert turn(b, store, 22.0)
    assert (store.lease.holder, store.lease.epoch, store.lease.transitions) == ("b", 2, 1)
    a.observed(store.lease, 22.5)
    assert a.lease(22.5) == Lease("b", 2, 0.0)


def test_the_wait_is_by_the_candidates_own_clock_however_wrong_the_stored_times_are() -> None:
    store, b = Store(), LeaseElection("b", DURATION_S)
    store.write(LeaseObject("a", 4, DURATION_S, 3, "1970-01-01", "1970-01-01"))
    assert not turn(b, store, 1000.0)  # first seen now: its age is not known
    assert not turn(b, store, 1009.0)
    assert turn(b, store, 1010.0)
    assert store.lease.epoch == 5


def test_of_two_that_try_at_once_one_is_refused_and_waits() -> None:
    store, b, c = Store(), LeaseElection("b", DURATION_S), LeaseElection("c", DURATION_S)
    store.write(LeaseObject("a", 1, DURATION_S))
    for each in (b, c):
        each.observed(store.lease, 0.0)
    b.observed(store.lease, 10.0)
    c.observed(store.lease, 10.0)
    first, second = b.wanted(10.0, "t"), c.wanted(10.0, "t")
    assert first is not None
    assert second is not None
    stored = store.write(first)
    assert stored is not None
    b.wrote(stored, 10.0)
    assert store.write(second) is None
    assert c.lease(10.0).ttl_s == 0.0
    assert not turn(c, store, 10.1)
    assert store.lease.holder == "b"


def test_a_holder_that_cannot_renew_stops_before_another_begins() -> None:
    """Whatever the phase of the two clocks' reads, at no time do both lead."""
    for phase in range(20):
        store, a, b = Store(), LeaseElection("a", DURATION_S), LeaseElection("b", DURATION_S)
        la, lb = Leadership("a"), Leadership("b")
        turn(a, store, 0.0)
        began = None
        for tick in range(300):
            now = 0.1 * tick
            if tick % 20 == phase:
                turn(b, store, now)
            la.answered(a.lease(now), now)  # a is cut off: it reads and writes nothing
            lb.answered(b.lease(now), now)
            assert not (la.epoch(now) and lb.epoch(now)), now
            if began is None and lb.epoch(now):
                began = now
        assert began is not None
        assert DURATION_S <= began <= DURATION_S + 4.1


def test_a_lease_given_up_is_taken_at_once() -> None:
    store, a, b = Store(), LeaseElection("a", DURATION_S), LeaseElection("b", DURATION_S)
    turn(a, store, 0.0)
    assert not turn(b, store, 1.0)
    given_up = a.released()
    assert given_up is not None
    a.observed(store.write(given_up) or LeaseObject(), 2.0)
    assert a.lease(2.0).ttl_s == 0.0
    assert turn(b, store, 2.1)
    assert store.lease.epoch == 2
    assert a.released() is None


def test_epochs_pass_those_that_the_catalog_knows() -> None:
    store, a = Store(), LeaseElection("a", DURATION_S)
    turn(a, store, 0.0, known_epoch=17)
    assert store.lease.epoch == 18
    turn(a, store, 1.0, known_epoch=18)
    assert store.lease.epoch == 18, "its own epoch is no reason for a new one"
    turn(a, store, 2.0, known_epoch=30)
    assert store.lease.epoch == 31


def test_a_stranger_who_touches_the_object_does_not_prolong_the_lease() -> None:
    store, b = Store(), LeaseElection("b", DURATION_S)
    store.write(LeaseObject("a", 1, DURATION_S))
    turn(b, store, 0.0)
    for now in (3.0, 6.0, 9.0):
        store.write(dataclasses.replace(store.lease))
        assert not turn(b, store, now)
    assert turn(b, store, 10.0)
