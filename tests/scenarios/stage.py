"""Where a story plays: the deployment, what is stored on it, the load and what was remembered."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from longreach.errors import LongreachError
from longreach.sdk import Client
from longreach.security.peers import Role
from tests.scenarios import inspection
from tests.scenarios.deployment import REDIS, Deployment, Size
from tests.scenarios.inspection import NodeHoldings
from tests.scenarios.load import Library, Outcome, SteadyLoad
from tests.scenarios.verdict import Verdict

COPIES = 2
"""Of every context, on different nodes, when nothing is amiss."""
SERVED_TIMEOUT_S = 20.0
WHOLE_TIMEOUT_S = 60.0
CLEAN_TIMEOUT_S = 20.0
_CELLS = 3 * 2  # Layers x KV heads of the tiny model.
_POLL_S = 0.1


class Scene:
    """A deployment with its library: what all stories and chaos share. A context manager."""

    def __init__(self, folder: Path, size: Size | None = None) -> None:
        self.deployment = Deployment(folder, size)
        self.library = Library()
        self._client: Client | None = None

    def __enter__(self) -> Scene:
        self.deployment.__enter__()
        try:
            self._client = self.deployment.client()
            self.library.store(self._client)
            self.wait_whole()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._client.close()
        self.deployment.__exit__()

    @property
    def client(self) -> Client:
        """The client of all coordinators that the load uses."""
        assert self._client is not None, "the scene is not set"
        return self._client

    def holdings(self) -> list[NodeHoldings] | None:
        """What the nodes that run hold; None while one does not answer."""
        addresses = self.deployment.node_addresses()
        return inspection.answers(addresses, self.deployment.node_tls())

    def copies(self) -> int:
        """Of what is stored, the fewest copies that anything has on nodes that answer."""
        holdings = self.holdings()
        if holdings is None:
            return 0
        return min(
            inspection.fewest_copies(
                [held for node in holdings for held in node.sealed(context_id)],
                len(tokens),
                _CELLS,
            )
            for context_id, tokens in self.library.contexts.items()
        )

    def mapped(self) -> bool:
        """Whether every coordinator knows of enough copies on nodes that are up."""
        nodes = {n for n in self.deployment.named(Role.NODE) if self.deployment.members[n].answers}
        for coordinator in self.deployment.named(Role.COORDINATOR):
            with self.deployment.client(coordinator, timeout_s=3.0) as client:
                for context_id in self.library.contexts:
                    context = client.contexts.get(context_id)
                    held = [nodes.intersection(s.node_ids) for s in context.shard_map.shards]
                    if not context.ready or min(map(len, held)) < COPIES:
                        return False
        return True

    def whole(self) -> bool:
        """Whether everybody is up and everything has its copies, on the nodes and in the maps."""
        try:
            return self.deployment.up() and self.copies() >= COPIES and self.mapped()
        except LongreachError:
            return False

    def wait_whole(self, timeout_s: float = WHOLE_TIMEOUT_S) -> None:
        """Starts whom a fault ended, and waits until all is whole again."""
        self.deployment.links.heal()
        for name in (REDIS, *self.deployment.members):
            process = self.deployment.process(name)
            self.deployment.damage_switch(name).unlink(missing_ok=True)
            if process.paused:
                process.resume()
            if not process.alive:
                self.deployment.launch(name)
        wait_for(self.whole, timeout_s, self.what_is_amiss)

    def what_is_amiss(self) -> str:
        """Why it is not whole, for the message of a failed test."""
        if down := self.deployment.down():
            return f"not up: {', '.join(down)}"
        copies = self.copies()
        if copies < COPIES:
            return f"something has {copies} copies on the nodes, {COPIES} are due"
        return "the coordinators' maps do not name the copies, or contexts are not ready"

    def clean(self) -> bool:
        """Whether the nodes hold no session and no tail any more."""
        holdings = self.holdings()
        return holdings is not None and not any(
            node.sessions or node.stats.tail_bytes for node in holdings
        )

    def what_is_left(self) -> str:
        """Which sessions the nodes still hold."""
        left = {
            node.name: (list(node.sessions), node.stats.tail_bytes)
            for node in self.holdings() or []
        }
        return f"sessions and bytes of tail by node: {left}"


@dataclass
class Stage:
    """One story under way."""

    scene: Scene
    load: SteadyLoad | None = None
    fault_at: float = 0.0
    """When the last fault began, time.monotonic seconds."""
    it: str = ""
    """The member spoken of last."""
    added: list[str] = field(default_factory=list)

    @property
    def deployment(self) -> Deployment:
        """The processes."""
        return self.scene.deployment

    def member(self, spoken: str) -> str:
        """The member that words such as `node 1`, `the leader` or `it` mean."""
        name = self._find(spoken)
        assert name in (REDIS, *self.deployment.members), f"no member {spoken!r}"
        self.it = name
        return name

    def served(self) -> None:
        """Raises AssertionError unless every request got its own, right answer."""
        assert self.load is not None, "there was no load"
        outcomes = self.load.outcomes()
        assert outcomes, "no request was finished"
        bad = [o for o in outcomes if o.verdict not in (Verdict.EQUAL, Verdict.NEAR_TIE)]
        assert not bad, f"{len(bad)} of {len(outcomes)} requests:\n" + _told(bad)

    def _find(self, spoken: str) -> str:
        match spoken.split():
            case ["it"]:
                return self.it
            case ["redis"]:
                return REDIS
            case ["the", "leader"]:
                wait_for(lambda: bool(self.deployment.leader()), SERVED_TIMEOUT_S, "nobody leads")
                return self.deployment.leader()
            case ["the", "follower"]:
                leader = self._find("the leader")
                return next(c for c in self.deployment.named(Role.COORDINATOR) if c != leader)
            case ["the", "busiest", kind]:
                return self._busiest(Role(kind))
            case [kind, number]:
                return f"{kind}-{number}"
        return spoken

    def _busiest(self, role: Role) -> str:
        """The member with the most open sessions, then with the most bytes, that answers."""
        view = self.deployment.status(self._find("the leader"))
        fit = [m for m in view.members if m.kind == role.value and m.state == "alive"]
        return max(fit, key=lambda m: (m.sessions, m.used_bytes)).id


def wait_for(
    holds: Callable[[], bool], timeout_s: float, otherwise: str | Callable[[], str]
) -> None:
    """Waits for a condition; raises AssertionError with what is wrong when it takes longer."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            reason = otherwise if isinstance(otherwise, str) else otherwise()
            raise AssertionError(f"after {timeout_s} s: {reason}")
        time.sleep(_POLL_S)


def _told(outcomes: list[Outcome]) -> str:
    return "\n".join(f"    {outcome.stream}: {outcome}" for outcome in outcomes[:10])
