"""Membership as stories: each line is an event at a time and what it leads to."""

from __future__ import annotations

import re

import pytest
from coordinator_doubles import FakeNode, FakeWorker, model_info

from coordinator.cluster import Cluster, Drain, Heartbeat, Leave, Paused, Tick, Unreachable
from longreach.errors import StaleEpoch
from longreach.types import Shard, ShardMap, Span

STORIES = {
    "a silent member is suspected after 3 s, dead after 10 s, forgotten after an hour": """
        0     node n1        -> joined n1
        1     tick           ->
        2.9   tick           ->
        3     tick           -> suspected n1
        9     tick           ->
        10    tick           -> died n1
        11    tick           ->
        3600  tick           -> forgotten n1
        3601  node n1        -> joined n1
    """,
    "a heartbeat brings a suspect or dead member back": """
        0     node n1        -> joined n1
        4     tick           -> suspected n1
        5     node n1        -> recovered n1
        7     tick           ->
        16    tick           -> died n1
        17    node n1        -> recovered n1
    """,
    "a new process under an old name has lost its memory and the old one is refused": """
        0     node n1        -> joined n1
        1     node n1 #2     -> restarted n1
        1.5   node n1 #1     -> refused
        2     node n1 #2     ->
        3     node n1 #3     -> restarted n1
        3.5   node n1 #2     -> refused
    """,
    "a member that moves keeps its memory": """
        0     node n1        -> joined n1
        1     node n1 @b:2   -> moved n1
        2     node n1 @b:2   ->
    """,
    "a member that takes leave gets no work and is not mourned": """
        0     worker w1      -> joined w1
        1     leave w1 #2    ->
        1     leave w1       -> left w1
        2     worker w1      ->
        3     leave w1       ->
        8     tick           ->
        12    tick           ->
        62    tick           -> forgotten w1
    """,
    "a member that took leave may come back as a new process": """
        0     worker w1      -> joined w1
        1     leave w1       -> left w1
        2     worker w1 #2   -> restarted w1
    """,
    "a broken connection makes a member suspect until it reports again": """
        0     worker w1      -> joined w1
        1     broken w1      -> suspected w1
        1     broken w1      ->
        2     worker w1      -> recovered w1
        2     broken nobody  ->
    """,
    "a member that drains keeps what it has, in any state, until its process ends": """
        0     node n1        -> joined n1
        1     drain n1       -> draining n1
        1     drain n1       ->
        2     node n1        ->
        5     tick           -> suspected n1
        6     node n1        -> recovered n1
        7     node n1 #2     -> restarted n1
        8     drain nobody   ->
    """,
    "a member may say itself that it drains": """
        0     node n1        -> joined n1
        1     node n1 draining  -> draining n1
        2     node n1 draining  ->
        3     leave n1       -> left n1
    """,
    "two members age apart": """
        0     node n1        -> joined n1
        2     node n2        -> joined n2
        4     tick           -> suspected n1
        5     tick           -> suspected n2
        10    tick           -> died n1
        12    tick           -> died n2
    """,
    "a coordinator that stood still does not take its own silence for its members'": """
        0     node n1        -> joined n1
        2     node n2        -> joined n2
        30    paused 28      ->
        30    tick           ->
        30.5  node n2        ->
        31    tick           -> suspected n1
        38    tick           -> died n1, suspected n2
    """,
}


def _event(words):
    kind = words[0]
    if kind == "tick":
        return Tick()
    if kind == "paused":
        return Paused(float(words[1]))
    name = words[1]
    if kind == "broken":
        return Unreachable(name)
    marks = {word[0]: word[1:] for word in words[2:]}
    incarnation = int(marks.get("#", 1))
    if kind == "drain":
        return Drain(name)
    if kind == "leave":
        return Leave(name, incarnation)
    report = {
        "node": {"node": FakeNode(name).stats()},
        "worker": {"worker": FakeWorker({}).status()},
    }
    return Heartbeat(
        name,
        incarnation,
        marks.get("@", "a:1"),
        cores=4,
        draining="draining" in words,
        **report[kind],
    )


def _apply(cluster, time, words):
    try:
        return ", ".join(str(action) for action in cluster.apply(_event(words), time))
    except StaleEpoch:
        return "refused"


@pytest.mark.parametrize("title", STORIES)
def test_membership_story(title):
    cluster = Cluster()
    told, lines = [], [line.strip() for line in STORIES[title].strip().splitlines()]
    for line in lines:
        time, event, _ = re.match(r"(\S+)\s+(.*?)\s*->\s*(.*)", line).groups()
        told.append(f"{time} {event} -> {_apply(cluster, float(time), event.split())}".rstrip())
    assert told == [re.sub(r"\s+", " ", line) for line in lines]


def test_only_members_that_are_alive_get_new_work():
    cluster = Cluster()
    for name in ("n1", "n2"):
        cluster.apply(_event(["node", name]), 0.0)
    cluster.apply(_event(["worker", "w1"]), 0.0)
    assert [m.member_id for m in cluster.nodes()] == ["n1", "n2"]
    assert [m.member_id for m in cluster.workers()] == ["w1"]
    cluster.apply(_event(["node", "n1"]), 4.0)
    cluster.apply(Tick(), 4.0)
    assert [m.member_id for m in cluster.nodes()] == ["n1"]
    assert cluster.workers() == []
    assert cluster.member("n2").reachable
    cluster.apply(Tick(), 10.0)
    assert not cluster.member("n2").reachable


def test_the_epoch_grows_with_every_change_and_only_then():
    cluster = Cluster()
    cluster.apply(_event(["node", "n1"]), 0.0)
    assert cluster.epoch == 1
    cluster.apply(_event(["node", "n1"]), 1.0)
    assert cluster.epoch == 1
    cluster.apply(Tick(), 5.0)
    assert cluster.epoch == 2


def test_a_shard_map_gets_the_addresses_its_nodes_have_now():
    cluster = Cluster()
    cluster.apply(_event(["node", "n1", "@new:1"]), 0.0)
    shards = tuple(
        Shard(f"s{i}", Span(0, 9), (i,), 0, 1, (name,)) for i, name in enumerate(("n1", "n2"))
    )
    old = ShardMap(shards, {"n1": "old:1", "n2": "old:2"}, "layer")
    assert cluster.readdress(old).addresses == {"n1": "new:1", "n2": "old:2"}


def test_a_worker_report_is_kept_whole():
    cluster = Cluster()
    cluster.apply(_event(["worker", "w1"]), 0.0)
    assert cluster.member("w1").report.worker.model == model_info()
