"""What EndpointSlices say of the retrieval nodes' pods: their zones, and those that are gone.

A hint only. A pod that vanishes from the slices is suspect at once, seconds before its silence is
noticed; its next heartbeat, if there is one, makes it alive again. Nobody joins or dies by it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A pod behind a service: `pod` is its name, which is the node's id; `zone` may be empty.
    `serving` is false for one that shuts down."""

    pod: str
    zone: str = ""
    serving: bool = True


@dataclass(frozen=True, slots=True)
class SliceEvent:
    """A slice as it is now; without endpoints where it was deleted."""

    name: str
    endpoints: tuple[Endpoint, ...] = ()


class Endpoints:
    """The endpoints of one service, over all its slices."""

    def __init__(self) -> None:
        self._slices: dict[str, tuple[Endpoint, ...]] = {}
        self._zones: dict[str, str] = {}

    def listed(self, slices: Iterable[SliceEvent]) -> list[str]:
        """Takes a whole list; returns the pods that are gone since."""
        before = self.pods()
        self._slices = {each.name: each.endpoints for each in slices if each.endpoints}
        return self._gone(before)

    def changed(self, event: SliceEvent) -> list[str]:
        """Takes an event of the watch; returns the pods that are gone by it.

        An endpoint may move from one slice to another, and be in both, or for a moment in neither:
        that is taken for gone, and the heartbeat that follows puts it right.
        """
        before = self.pods()
        self._slices.pop(event.name, None)
        if event.endpoints:
            self._slices[event.name] = event.endpoints
        return self._gone(before)

    def pods(self) -> set[str]:
        """The pods that are there, ready or not."""
        return {each.pod for endpoints in self._slices.values() for each in endpoints}

    def zone(self, pod: str) -> str:
        """The zone of the machine that the pod runs on; empty where it is not known."""
        return self._zones.get(pod, "")

    def _gone(self, before: set[str]) -> list[str]:
        for endpoints in self._slices.values():
            self._zones.update({each.pod: each.zone for each in endpoints if each.zone})
        return sorted(before - self.pods())
