"""Follows the EndpointSlices of a service: lists them, watches, lists again after a gap."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from coordinator.kubernetes.api import Expired, KubernetesApi
from coordinator.kubernetes.endpoints import Endpoints
from longreach.errors import LongreachError

PAUSE_S = 0.5
PAUSE_MAX_S = 30.0
RELIST_FAULTS = 5
_log = logging.getLogger(__name__)


class EndpointInformer:
    """Keeps `endpoints` up to date and tells `on_gone` of each pod that vanished."""

    def __init__(
        self,
        api: KubernetesApi,
        service: str,
        on_gone: Callable[[str], None],
        *,
        pause_s: float = PAUSE_S,
    ) -> None:
        self.endpoints = Endpoints()
        self._api = api
        self._service = service
        self._on_gone = on_gone
        self._pause_s = pause_s
        self._version = ""

    async def run(self) -> None:
        """Follows until cancelled. Faults are waited out, longer each time."""
        faults = 0
        while True:
            try:
                if not self._version:
                    await self._list()
                await self._watch()
                faults = 0
            except Expired:
                self._version = ""
            except LongreachError as error:
                faults += 1
                if faults == 1:
                    _log.warning("endpoints of %s: %s", self._service, error)
                if faults % RELIST_FAULTS == 0:
                    self._version = ""
            # A server that ends watches at once, or history that is always too old, must not make
            # this a busy loop.
            await asyncio.sleep(min(PAUSE_MAX_S, self._pause_s * 2 ** min(faults, 10)))

    async def _list(self) -> None:
        listed = await self._api.list_slices(self._service)
        self._tell(self.endpoints.listed(listed.slices))
        self._version = listed.version

    async def _watch(self) -> None:
        """Takes events until the server ends the watch; a watch that breaks goes on from there."""
        watch = self._api.watch_slices(self._service, self._version)
        async with contextlib.aclosing(watch) as events:
            async for event, version in events:
                if event is not None:
                    self._tell(self.endpoints.changed(event))
                self._version = version

    def _tell(self, gone: list[str]) -> None:
        for pod in gone:
            _log.info("pod %s is no longer behind %s", pod, self._service)
            self._on_gone(pod)
