"""The steps that stories are told in; each is a phrase and what it does on the stage.

A new step is a function here with a `@step` that gives its phrase as a regular expression; named
groups are its arguments. Steps wait for conditions, never for a guessed time.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from longreach.errors import Unavailable
from longreach.security.peers import Role
from tests.scenarios.deployment import REDIS
from tests.scenarios.load import SteadyLoad
from tests.scenarios.stage import (
    CLEAN_TIMEOUT_S,
    COPIES,
    SERVED_TIMEOUT_S,
    WHOLE_TIMEOUT_S,
    Stage,
    wait_for,
)

Action = Callable[..., None]
_UP_TIMEOUT_S = 60.0
_LEAVE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Phrase:
    """A step's words and what they do."""

    pattern: re.Pattern[str]
    action: Action


PHRASES: list[Phrase] = []


def step(pattern: str) -> Callable[[Action], Action]:
    """Registers a function as the step with these words."""

    def register(action: Action) -> Action:
        PHRASES.append(Phrase(re.compile(pattern), action))
        return action

    return register


def find(words: str) -> tuple[Action, dict[str, str]]:
    """The step that these words name, and its arguments. Raises ValueError for none or several."""
    found = [(p.action, m.groupdict()) for p in PHRASES if (m := p.pattern.fullmatch(words))]
    if len(found) != 1:
        raise ValueError(f"{len(found)} steps are called {words!r}; steps.py has them all")
    return found[0]


# Load.


@step("steady load")
def steady_load(stage: Stage) -> None:
    """Four streams of requests from now to the end of the story."""
    stage.load = SteadyLoad(stage.scene.client, stage.scene.library).__enter__()
    stage.fault_at = time.monotonic()
    served(stage)


@step("wait until served")
def served(stage: Stage) -> None:
    """Every stream gets tokens for a question that it asked after the last fault began."""
    done = _load(stage).wait_anew(stage.fault_at, SERVED_TIMEOUT_S)
    bad = [str(o) for o in _load(stage).outcomes(stage.fault_at) if o.error is not None]
    silent = _load(stage).silent(stage.fault_at)
    assert done, (
        f"in {SERVED_TIMEOUT_S} s no answer to a new question: "
        f"{_load(stage).unanswered(stage.fault_at)}; without any token: {silent}; failed: {bad[:5]}"
    )


@step(r"wait (?P<seconds>[\d.]+) s")
def wait(stage: Stage, seconds: str) -> None:
    """Lets a fault last; only for what a duration belongs to."""
    time.sleep(float(seconds))


# Processes.


@step(r"kill (?P<who>.+?)")
def kill(stage: Stage, who: str) -> None:
    """SIGKILL."""
    name = stage.member(who)
    _fault(stage)
    stage.deployment.process(name).kill()


@step(r"pause (?P<who>.+)")
def pause(stage: Stage, who: str) -> None:
    """SIGSTOP: connections stay, nothing is answered."""
    name = stage.member(who)
    _fault(stage)
    stage.deployment.process(name).pause()


@step(r"resume (?P<who>.+)")
def resume(stage: Stage, who: str) -> None:
    """SIGCONT."""
    name = stage.member(who)
    _fault(stage)
    stage.deployment.process(name).resume()


@step(r"start (?P<who>.+)")
def start(stage: Stage, who: str) -> None:
    """Starts a member again under its identity and waits until it is up."""
    name = stage.member(who)
    stage.deployment.launch(name)
    wait_for(lambda: stage.deployment.up(name), _UP_TIMEOUT_S, f"{name} is not up")


@step(r"lose the snapshots of (?P<who>.+)")
def lose_snapshots(stage: Stage, who: str) -> None:
    """Empties a dead node's disk."""
    name = stage.member(who)
    stage.deployment.lose_snapshots(name)


@step(r"stop (?P<who>.+)")
def stop(stage: Stage, who: str) -> None:
    """SIGTERM, and waits until it has left: it hands over or drains what it has."""
    name = stage.member(who)
    _fault(stage)
    process = stage.deployment.process(name)
    process.terminate()
    assert process.wait_ended(_LEAVE_TIMEOUT_S), f"{name} ignores SIGTERM; {process.log_tail()}"


@step(r"drain (?P<who>.+)")
def drain(stage: Stage, who: str) -> None:
    """What `longreach nodes drain` does: a node's shards move to others while it answers."""
    name = stage.member(who)
    _fault(stage)
    reports = stage.deployment.drain(name, WHOLE_TIMEOUT_S)
    assert reports, f"nothing was said about draining {name}"
    assert not reports[-1].shards_left, f"{name} still holds shards: {reports[-1]}"


@step(r"restart (?P<who>.+)")
def restart(stage: Stage, who: str) -> None:
    """SIGTERM, then the next life; as in an upgrade."""
    stop(stage, who)
    start(stage, "it")


@step(r"add a (?P<kind>node|worker)")
def add(stage: Stage, kind: str) -> None:
    """A new member joins."""
    _fault(stage)
    stage.it = stage.deployment.add(Role(kind))
    stage.added.append(stage.it)
    wait_for(lambda: stage.deployment.up(stage.it), _UP_TIMEOUT_S, f"{stage.it} is not up")


@step(r"remove (?P<who>.+)")
def remove(stage: Stage, who: str) -> None:
    """A member leaves for good, in order."""
    stop(stage, who)
    stage.deployment.forget(stage.it)
    if stage.it in stage.added:
        stage.added.remove(stage.it)


# Links.


@step(r"cut (?P<one>.+) from (?P<other>.+)")
def cut(stage: Stage, one: str, other: str) -> None:
    """A partition: no bytes between the two, either way, though both live."""
    left, right = stage.member(one), stage.member(other)
    _fault(stage)
    for caller, callee in ((left, right), (right, left)):
        stage.deployment.links.cut(caller, callee)


@step(r"slow (?P<who>.+) by (?P<milliseconds>\d+) ms")
def slow(stage: Stage, who: str, milliseconds: str) -> None:
    """Everything to and from a member's port takes longer."""
    name = stage.member(who)
    _fault(stage)
    for caller in stage.deployment.members:
        stage.deployment.links.slow(caller, name, int(milliseconds) / 1e3)


@step(r"damage the bytes from (?P<callee>.+) to (?P<caller>.+)")
def damage_bytes(stage: Stage, callee: str, caller: str) -> None:
    """The network flips bits below TLS."""
    target, source = stage.member(caller), stage.member(callee)
    _fault(stage)
    stage.deployment.links.damage(target, source)


@step(r"damage the replies of (?P<who>.+)")
def damage_replies(stage: Stage, who: str) -> None:
    """The node's memory flips bits above TLS."""
    name = stage.member(who)
    _fault(stage)
    stage.deployment.damage_switch(name).touch()


@step("heal")
def heal(stage: Stage) -> None:
    """All links and replies are good again."""
    _fault(stage)
    stage.deployment.links.heal()
    for name in stage.deployment.members:
        stage.deployment.damage_switch(name).unlink(missing_ok=True)


# Conditions.


@step("wait until repaired")
def repaired(stage: Stage) -> None:
    """Everything has its copies again on the nodes that are left."""
    wait_for(
        lambda: stage.scene.copies() >= COPIES,
        WHOLE_TIMEOUT_S,
        lambda: f"something has {stage.scene.copies()} copies",
    )


@step("wait until whole")
def whole(stage: Stage) -> None:
    """Everybody is back and everything has its copies."""
    stage.scene.wait_whole()


@step("wait until nothing is stored on (?P<who>.+)")
def nothing_stored(stage: Stage, who: str) -> None:
    """A node holds no shard any more; those that sessions still read go a little later."""
    name = stage.member(who)

    def held() -> list[str]:
        nodes = [node for node in stage.scene.holdings() or [] if node.name == name]
        return [f"{each.context_id} {each.shard.shard_id}" for n in nodes for each in n.shards]

    wait_for(lambda: not held(), WHOLE_TIMEOUT_S, lambda: f"{name} still holds {held()}")


@step("wait until something is stored on (?P<who>.+)")
def something_stored(stage: Stage, who: str) -> None:
    """A node has got a share."""
    name = stage.member(who)
    wait_for(
        lambda: any(n.name == name and n.shards for n in stage.scene.holdings() or []),
        WHOLE_TIMEOUT_S,
        f"{name} holds nothing",
    )


@step("creating a context fails clearly")
def creating_fails(stage: Stage) -> None:
    """What needs the catalog says so, and when to try again."""
    with pytest.raises(Unavailable) as caught:
        stage.scene.client.contexts.create(tokens=[1, 2, 3] * 100, timeout_s=SERVED_TIMEOUT_S)
    assert caught.value.reason == "CATALOG_UNAVAILABLE", caught.value.message
    assert caught.value.retry_after_s


@step("a context can be created")
def creating_works(stage: Stage) -> None:
    """Stores one more context and deletes it."""
    client = stage.scene.client
    tokens = [int(time.time()) % 251, 7, 9] * 100
    context = client.contexts.create(tokens=tokens, timeout_s=SERVED_TIMEOUT_S)
    assert context.ready
    client.contexts.delete(context, timeout_s=SERVED_TIMEOUT_S)


@step("the end")
def end(stage: Stage) -> None:
    """What every story ends with: all was served, all is whole, nothing is left behind."""
    _load(stage).stop()
    stage.served()
    stage.scene.wait_whole()
    wait_for(stage.scene.clean, CLEAN_TIMEOUT_S, stage.scene.what_is_left)
    strays = stage.deployment.strays()
    assert not strays, f"processes that nobody ended: {strays}"


def _fault(stage: Stage) -> None:
    stage.fault_at = time.monotonic()


def _load(stage: Stage) -> SteadyLoad:
    assert stage.load is not None, "there is no load"
    return stage.load


__all__ = ["PHRASES", "REDIS", "find"]
