"""The faults of chaos: what each does to a scene, and how it is lifted. One at a time.

A fault is a function that harms the scene and returns what to do when its time is over. Members
are drawn from `numbers`, so that a seed gives the same faults where the same members are there.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator

from longreach.security.peers import Role
from tests.scenarios.deployment import REDIS, Deployment

Lift = Callable[[], None]
Fault = Callable[[Deployment, random.Random], tuple[str, Lift]]
FAULTS: dict[str, Fault] = {}
SLOW_S = 0.4
STOP_TIMEOUT_S = 60.0


def _fault(kind: str) -> Callable[[Fault], Fault]:
    def register(fault: Fault) -> Fault:
        FAULTS[kind] = fault
        return fault

    return register


def sequence(numbers: random.Random) -> Iterator[str]:
    """Kinds without end: all in random order, then all in another one, and so on."""
    kinds = sorted(FAULTS)
    while True:
        numbers.shuffle(kinds)
        yield from kinds


def _pick(deployment: Deployment, role: Role, numbers: random.Random) -> str:
    """A member of the role that is up."""
    down = deployment.down(*deployment.named(role))
    return numbers.choice([name for name in deployment.named(role) if name not in down])


def _kill(role: Role) -> Fault:
    def fault(deployment: Deployment, numbers: random.Random) -> tuple[str, Lift]:
        name = _pick(deployment, role, numbers)
        deployment.process(name).kill()
        return name, lambda: deployment.launch(name)

    return fault


def _pause(role: Role) -> Fault:
    def fault(deployment: Deployment, numbers: random.Random) -> tuple[str, Lift]:
        name = _pick(deployment, role, numbers)
        deployment.process(name).pause()
        return name, deployment.process(name).resume

    return fault


def _restart(role: Role) -> Fault:
    def fault(deployment: Deployment, numbers: random.Random) -> tuple[str, Lift]:
        name = _pick(deployment, role, numbers)
        deployment.process(name).terminate()

        def lift() -> None:
            assert deployment.process(name).wait_ended(STOP_TIMEOUT_S), f"{name} ignores SIGTERM"
            deployment.launch(name)

        return name, lift

    return fault


def _cut(one: Role, other: Role) -> Fault:
    def fault(deployment: Deployment, numbers: random.Random) -> tuple[str, Lift]:
        left, right = _pick(deployment, one, numbers), _pick(deployment, other, numbers)
        deployment.links.cut(left, right)
        deployment.links.cut(right, left)
        return f"{left} / {right}", deployment.links.heal

    return fault


for _role in (Role.NODE, Role.WORKER, Role.COORDINATOR):
    _fault(f"kill {_role.value}")(_kill(_role))
    _fault(f"pause {_role.value}")(_pause(_role))
    _fault(f"restart {_role.value}")(_restart(_role))
_fault("cut worker from node")(_cut(Role.WORKER, Role.NODE))
_fault("cut node from coordinator")(_cut(Role.NODE, Role.COORDINATOR))
_fault("cut worker from coordinator")(_cut(Role.WORKER, Role.COORDINATOR))


@_fault("kill leader")
def _kill_leader(deployment: Deployment, numbers: random.Random) -> tuple[str, Lift]:
    name = deployment.leader() or _pick(deployment, Role.COORDINATOR, numbers)
    deployment.process(name).kill()
    return name, lambda: deployment.launch(name)


@_fault("kill node and its disk")
def _lose_node(deployment: Deployment, numbers: random.Random) -> tuple[str, Lift]:
    name = _pick(deployment, Role.NODE, numbers)
    deployment.process(name).kill()
    deployment.lose_snapshots(name)
    return name, lambda: deployment.launch(name)


@_fault("slow node")
def _slow_node(deployment: Deployment, numbers: random.Random) -> tuple[str, Lift]:
    name = _pick(deployment, Role.NODE, numbers)
    for caller in deployment.members:
        deployment.links.slow(caller, name, SLOW_S)
    return name, deployment.links.heal


@_fault("damaged bytes")
def _damage_bytes(deployment: Deployment, numbers: random.Random) -> tuple[str, Lift]:
    name = _pick(deployment, Role.NODE, numbers)
    for worker in deployment.named(Role.WORKER):
        deployment.links.damage(worker, name)
    return name, deployment.links.heal


@_fault("damaged replies")
def _damage_replies(deployment: Deployment, numbers: random.Random) -> tuple[str, Lift]:
    name = _pick(deployment, Role.NODE, numbers)
    switch = deployment.damage_switch(name)
    switch.touch()

    def lift() -> None:
        with contextlib.suppress(FileNotFoundError):
            switch.unlink()

    return name, lift


@_fault("kill redis")
def _kill_redis(deployment: Deployment, numbers: random.Random) -> tuple[str, Lift]:
    deployment.redis.kill()
    return REDIS, lambda: deployment.launch(REDIS)
