"""Keeps a Lease: reads it, asks the election what to write, writes it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from coordinator.catalog.base import Lease
from coordinator.kubernetes.api import KubernetesApi, timestamp
from coordinator.kubernetes.election import DURATION_S, RENEW_S, LeaseElection
from longreach.errors import Aborted, LongreachError

_log = logging.getLogger(__name__)


class LeaseKeeper:
    """Takes part in the election of `lease_name` as `candidate` until it is released."""

    def __init__(
        self,
        api: KubernetesApi,
        lease_name: str,
        candidate: str,
        *,
        duration_s: float = DURATION_S,
        renew_s: float = RENEW_S,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._api = api
        self._lease_name = lease_name
        self._election = LeaseElection(candidate, duration_s)
        self._renew_s = renew_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._answered = True
        self.known_epoch = 0
        """The highest fencing epoch that anyone here has heard of."""

    def lease(self) -> Lease:
        """Who leads as far as is known; the time left counts from now."""
        return self._election.lease(self._clock())

    async def run(self) -> None:
        """Renews or watches the Lease until cancelled."""
        while True:
            await self.try_once()
            await asyncio.sleep(self._renew_s)

    async def try_once(self) -> None:
        """One look and, where the election says so, one write. A fault costs a turn: the lease
        that is held goes on until its own end."""
        try:
            self._election.observed(await self._api.read_lease(self._lease_name), self._clock())
            asked_at = self._clock()
            wanted = self._election.wanted(
                asked_at, timestamp(self._wall_clock()), self.known_epoch
            )
            if wanted is not None:
                stored = await self._api.write_lease(self._lease_name, wanted)
                self._election.wrote(stored, asked_at)
            self._answered = True
        except Aborted:
            _log.info("another coordinator was faster at the lease %s", self._lease_name)
        except LongreachError as error:
            if self._answered:
                _log.warning("the lease %s is left alone for now: %s", self._lease_name, error)
            self._answered = False

    async def release(self) -> None:
        """Gives the Lease up, so that another leads within a beat."""
        given_up = self._election.released()
        if given_up is not None:
            with contextlib.suppress(LongreachError):
                self._election.observed(
                    await self._api.write_lease(self._lease_name, given_up), self._clock()
                )
