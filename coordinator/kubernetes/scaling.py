"""How many retrieval nodes there should be: a pure decision, one step at a time.

Memory that is short is cured at once, plenty only after it has lasted, and a node goes in two
steps: the one with the highest number is evacuated, since a StatefulSet removes no other, and the
set shrinks when that node itself reports that it holds nothing. Whenever memory is short, or a
node is away that may hold something, nothing shrinks.

    settled ──short──────────────> Grow
    settled ──plenty for a while─> Evacuate ──node is empty──> Shrink
                                       └──────short──────────> Keep, then Grow
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rules:
    """The bounds and thresholds of CoordinatorConfig."""

    nodes_min: int
    nodes_max: int
    out_above: float = 0.85
    in_below: float = 0.5
    in_after_s: float = 1800.0


@dataclass(frozen=True, slots=True)
class Seat:
    """A pod of the set. `used_bytes` counts KV, tails and indexes; `sessions` those open on it.
    `alive` is false for one whose node does not report."""

    ordinal: int
    alive: bool = True
    used_bytes: int = 0
    limit_bytes: int = 0
    sessions: int = 0

    @property
    def empty(self) -> bool:
        """Whether the node says that it holds nothing."""
        return self.alive and self.used_bytes == 0 and self.sessions == 0


@dataclass(frozen=True, slots=True)
class View:
    """The set as it is: `replicas` are those asked for, one seat each. `refused_bytes` is what
    contexts lacked that were refused for want of memory since the last decision."""

    replicas: int
    seats: tuple[Seat, ...]
    refused_bytes: int = 0

    @property
    def used_bytes(self) -> int:
        """Over all nodes that report."""
        return sum(seat.used_bytes for seat in self.seats if seat.alive)

    @property
    def limit_bytes(self) -> int:
        """Over all nodes that report."""
        return sum(seat.limit_bytes for seat in self.seats if seat.alive)

    @property
    def highest(self) -> Seat | None:
        """The one that the set would remove."""
        return next((seat for seat in self.seats if seat.ordinal == self.replicas - 1), None)


@dataclass(frozen=True, slots=True)
class Memory:
    """What a decision hands to the next: since when memory was plentiful, which seat is being
    evacuated."""

    plenty_since: float | None = None
    evacuating: int | None = None


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do, and why."""

    why: str


@dataclass(frozen=True, slots=True)
class Grow:
    """The set is to have more nodes."""

    replicas: int
    why: str


@dataclass(frozen=True, slots=True)
class Evacuate:
    """A node is to move what it holds to the others and to take nothing new."""

    ordinal: int
    why: str


@dataclass(frozen=True, slots=True)
class Keep:
    """A node that is being evacuated is to stay after all."""

    ordinal: int
    why: str


@dataclass(frozen=True, slots=True)
class Shrink:
    """The set is to lose its last node, which is empty."""

    replicas: int
    why: str


Decision = Wait | Grow | Evacuate | Keep | Shrink


def decide(rules: Rules, view: View, memory: Memory, now: float) -> tuple[Decision, Memory]:
    """The next step, and what to remember for the decision after it."""
    if memory.evacuating is not None and memory.evacuating != view.replicas - 1:
        memory = Memory()  # somebody else sized the set meanwhile
    if view.replicas < rules.nodes_min:
        return Grow(rules.nodes_min, f"fewer than scale_nodes_min={rules.nodes_min}"), Memory()
    away = [seat.ordinal for seat in view.seats if not seat.alive]
    if away or len(view.seats) != view.replicas:
        kept = dataclasses.replace(memory, plenty_since=None)
        return Wait(f"{view.replicas} nodes wanted, away: {away}"), kept
    short = _shortage(rules, view, leaving=memory.evacuating)
    if short:
        if memory.evacuating is not None:
            return Keep(memory.evacuating, short), Memory()
        if view.replicas < rules.nodes_max:
            return Grow(_enough(rules, view), short), Memory()
        return Wait(f"{short}; scale_nodes_max={rules.nodes_max} is reached"), Memory()
    if memory.evacuating is not None and view.replicas <= rules.nodes_min:
        return Keep(memory.evacuating, f"scale_nodes_min={rules.nodes_min} is reached"), Memory()
    if memory.evacuating is not None:
        return _finish(view, memory)
    return _plenty(rules, view, memory, now)


def _shortage(rules: Rules, view: View, leaving: int | None) -> str:
    """Why memory is short, that of a node which is being evacuated not counted; empty when it is
    not."""
    if view.refused_bytes:
        return f"a context was refused for {view.refused_bytes} bytes"
    limit_bytes = sum(s.limit_bytes for s in view.seats if s.alive and s.ordinal != leaving)
    if view.used_bytes > rules.out_above * limit_bytes:
        share = view.used_bytes / max(1, limit_bytes)
        return f"{share:.0%} of memory in use, more than {rules.out_above:.0%}"
    return ""


def _enough(rules: Rules, view: View) -> int:
    """The fewest nodes, as large as those there are, that hold everything below the threshold."""
    each = view.limit_bytes / view.replicas
    wanted = (view.used_bytes + view.refused_bytes) / (rules.out_above * each) if each else 0
    return min(rules.nodes_max, max(view.replicas + 1, math.ceil(wanted)))


def _finish(view: View, memory: Memory) -> tuple[Decision, Memory]:
    seat = view.highest
    assert seat is not None
    if seat.empty:
        return Shrink(view.replicas - 1, f"node {seat.ordinal} is empty"), Memory()
    held = f"node {seat.ordinal} still holds {seat.used_bytes} bytes, {seat.sessions} sessions"
    return Wait(held), memory


def _plenty(rules: Rules, view: View, memory: Memory, now: float) -> tuple[Decision, Memory]:
    settled = f"{view.replicas} nodes are right"
    too_many = view.replicas > rules.nodes_max
    if view.replicas <= rules.nodes_min:
        return Wait(settled), Memory()
    seat = view.highest
    assert seat is not None
    others = view.limit_bytes - seat.limit_bytes
    if view.used_bytes >= (rules.out_above if too_many else rules.in_below) * others:
        return Wait(settled), Memory()
    since = now if memory.plenty_since is None else memory.plenty_since
    if not too_many and now - since < rules.in_after_s:
        return Wait(f"plenty of memory for {now - since:.0f} s"), Memory(plenty_since=since)
    share = view.used_bytes / max(1, others)
    why = f"the others would use {share:.0%} of their memory"
    return Evacuate(seat.ordinal, why), Memory(evacuating=seat.ordinal)
