"""Scaling as stories: each line is the set as it is, and the decision that follows.

A line is `seconds  node node ... [refused BYTES] [of N] -> decision`. A node is USED/LIMIT, `+S`
for open sessions, or `away`. The set's size is the number of nodes, unless `of N` says otherwise.
"""

from __future__ import annotations

import random
import re

import pytest

from coordinator.kubernetes.scaling import (
    Evacuate,
    Grow,
    Keep,
    Memory,
    Rules,
    Seat,
    Shrink,
    View,
    Wait,
    decide,
)

RULES = Rules(nodes_min=2, nodes_max=5, out_above=0.8, in_below=0.5, in_after_s=100)
STORIES = {
    "a set below its least size is grown to it, and a full one by what is needed": """
        0    0/100                      -> grow 2
        10   0/100 0/100                -> wait
        20   80/100 80/100              -> wait
        30   81/100 81/100              -> grow 3
        40   81/100 81/100 away         -> wait
        50   81/100 81/100 0/100        -> wait
    """,
    "a refused context is made room for at once, in one step, up to the most": """
        0    50/100 50/100              -> wait
        10   50/100 50/100 refused 1    -> grow 3
        20   50/100 50/100 0/100 refused 190 -> grow 4
        30   50/100 50/100 0/100 0/100 refused 900 -> grow 5
        40   90/100 90/100 90/100 90/100 90/100 refused 900 -> wait
    """,
    "plenty must last before the highest node is emptied and the set shrinks": """
        0    20/100 20/100 20/100       -> wait
        60   20/100 20/100 20/100       -> wait
        100  20/100 20/100 20/100       -> evacuate 2
        110  30/100 25/100 5/100        -> wait
        120  30/100 30/100 0/100+1      -> wait
        130  30/100 30/100 0/100        -> shrink 2
        140  30/100 30/100              -> wait
        900  10/100 10/100              -> wait
    """,
    "plenty that was interrupted starts anew": """
        0    20/100 20/100 20/100       -> wait
        90   40/100 40/100 40/100       -> wait
        100  20/100 20/100 20/100       -> wait
        199  20/100 20/100 20/100       -> wait
        200  20/100 20/100 20/100       -> evacuate 2
    """,
    "a context that needs room ends an evacuation before it grows the set": """
        0    20/100 20/100 20/100       -> wait
        100  20/100 20/100 20/100       -> evacuate 2
        110  30/100 25/100 5/100 refused 50 -> keep 2
        120  30/100 25/100 5/100        -> wait
        130  85/100 85/100 85/100       -> grow 4
    """,
    "a node that is leaving has no memory to give": """
        0    20/100 20/100 20/100       -> wait
        100  20/100 20/100 20/100       -> evacuate 2
        110  85/100 75/100 5/100        -> keep 2
        120  85/100 75/100 5/100        -> wait
    """,
    "nothing shrinks while a node is away that may hold something": """
        0    20/100 20/100 20/100       -> wait
        100  20/100 20/100 20/100       -> evacuate 2
        110  30/100 away 0/100          -> wait
        120  30/100 30/100 away         -> wait
        130  30/100 30/100 0/100        -> shrink 2
    """,
    "a node that is away resets the clock of plenty": """
        0    20/100 20/100 20/100       -> wait
        90   20/100 away 20/100         -> wait
        110  20/100 20/100 20/100       -> wait
        209  20/100 20/100 20/100       -> wait
        210  20/100 20/100 20/100       -> evacuate 2
    """,
    "a set that somebody else sized is looked at afresh": """
        0    20/100 20/100 20/100       -> wait
        100  20/100 20/100 20/100       -> evacuate 2
        110  20/100 20/100 20/100 0/100 -> wait
        210  20/100 20/100 20/100 0/100 -> evacuate 3
    """,
    "a node removed would leave the others too full to be worth it": """
        0    33/100 33/100 34/100       -> wait
        900  33/100 33/100 34/100       -> wait
    """,
    "more nodes than the most are given back without a wait, where the others have room": """
        0    70/100 70/100 70/100 70/100 70/100 70/100 -> wait
        10   50/100 50/100 50/100 50/100 50/100 50/100 -> evacuate 5
    """,
    "pods that are not there yet are waited for": """
        0    90/100 90/100 of 3         -> wait
        10   90/100 90/100 away         -> wait
    """,
}


def view_of(text: str) -> View:
    refused = re.search(r"refused (\d+)", text)
    size = re.search(r"of (\d+)", text)
    seats = []
    words = re.findall(r"away|\d+/\d+(?:\+\d+)?", re.sub(r"(refused|of) \d+", "", text))
    for ordinal, word in enumerate(words):
        if word == "away":
            seats.append(Seat(ordinal, alive=False))
            continue
        used, limit, sessions = (int(each) for each in re.split(r"[/+]", word + "+0")[:3])
        seats.append(Seat(ordinal, True, used, limit, sessions))
    replicas = int(size[1]) if size else len(seats)
    return View(replicas, tuple(seats), int(refused[1]) if refused else 0)


@pytest.mark.parametrize("story", STORIES)
def test_stories(story: str) -> None:
    memory = Memory()
    for line in STORIES[story].strip().splitlines():
        seconds, rest = line.split(maxsplit=1)
        seen, _, wanted = rest.partition("->")
        decision, memory = decide(RULES, view_of(seen), memory, float(seconds))
        match decision:
            case Wait():
                said = "wait"
            case Grow(replicas=number):
                said = f"grow {number}"
            case Shrink(replicas=number):
                said = f"shrink {number}"
            case Evacuate(ordinal=number):
                said = f"evacuate {number}"
            case Keep(ordinal=number):
                said = f"keep {number}"
        assert said == wanted.strip(), f"{line.strip()}: {decision}"
        assert decision.why


def test_a_decision_stays_within_its_bounds_whatever_is_seen() -> None:
    """Over random sets: never below the least or above the most, never a shrink of a node that
    holds something, never two steps at once."""
    pick = random.Random(7)
    memory = Memory()
    shrinks = 0
    for step in range(20_000):
        replicas = pick.randint(1, 7)
        seats = tuple(
            Seat(
                n, pick.random() > 0.05, pick.choice((0, 0, 9, 60, 95)), 100, pick.choice((0, 0, 3))
            )
            for n in range(replicas)
        )
        if pick.random() < 0.3:  # some histories follow an evacuation to its end
            memory = Memory(evacuating=replicas - 1)
        seen = View(replicas, seats, pick.choice((0, 0, 0, 50)))
        decision, memory = decide(RULES, seen, memory, float(step))
        if isinstance(decision, Grow):
            assert replicas < decision.replicas <= RULES.nodes_max
        if isinstance(decision, Shrink):
            shrinks += 1
            assert decision.replicas == replicas - 1 >= RULES.nodes_min
            assert all(seat.alive for seat in seats)
            assert seats[-1].used_bytes == seats[-1].sessions == 0
            assert not seen.refused_bytes
    assert shrinks > 20
