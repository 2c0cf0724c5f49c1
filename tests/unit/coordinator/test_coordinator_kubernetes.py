"""The Kubernetes integration against a server that speaks the API's wire format and its faults."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from coordinator_doubles import SECRET, FakeNode
from kubernetes_server import KubernetesServer

from coordinator.catalog.sqlite import SqliteCatalog
from coordinator.cluster import Cluster, Drain, Heartbeat, MemberState
from coordinator.config import CoordinatorConfig
from coordinator.coordinator import Coordinator
from coordinator.kubernetes import api as kubernetes_api
from coordinator.kubernetes.api import KubernetesApi, SetScale
from coordinator.kubernetes.elected_catalog import ElectedCatalog
from coordinator.kubernetes.informer import EndpointInformer
from coordinator.kubernetes.lease_keeper import LeaseKeeper
from coordinator.kubernetes.scaler import NodeScaler
from coordinator.kubernetes.scaling import Evacuate, Grow, Keep, Rules, Shrink, Wait
from coordinator.leadership import Leadership
from longreach.errors import Aborted, InvalidRequest, NotFound, PermissionDenied, Unavailable

DURATION_S = 2.0


@pytest.fixture
async def server() -> AsyncIterator[KubernetesServer]:
    running = KubernetesServer()
    await running.start()
    yield running
    await running.stop()


@pytest.fixture
async def api(server: KubernetesServer) -> AsyncIterator[KubernetesApi]:
    opened = KubernetesApi(server.url, "ai")
    yield opened
    await opened.close()


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def keeper(api: KubernetesApi, name: str) -> LeaseKeeper:
    return LeaseKeeper(api, "leader", name, duration_s=DURATION_S, renew_s=0.05)


# The Lease.


async def test_a_lease_is_created_renewed_given_up_and_taken(
    server: KubernetesServer, api: KubernetesApi
) -> None:
    a, b = keeper(api, "a"), keeper(api, "b")
    await a.try_once()
    await b.try_once()
    created = server.leases["leader"]
    assert created["spec"]["holderIdentity"] == "a"
    assert created["metadata"]["annotations"] == {"longreach.io/fencing-epoch": "1"}
    first = created["spec"]["renewTime"]
    await a.try_once()
    assert server.leases["leader"]["spec"]["renewTime"] > first
    assert server.leases["leader"]["spec"]["acquireTime"] == first
    assert a.lease().holder == b.lease().holder == "a"
    assert b.lease().ttl_s == 0 < a.lease().ttl_s <= DURATION_S
    await a.release()
    await b.try_once()
    spec = server.leases["leader"]["spec"]
    assert (spec["holderIdentity"], spec["leaseTransitions"]) == ("b", 1)
    assert b.lease().epoch == 2


async def test_times_are_written_with_six_decimals_even_on_a_whole_second(
    server: KubernetesServer, api: KubernetesApi
) -> None:
    """The API refuses a MicroTime without them; isoformat() leaves them out."""
    whole = LeaseKeeper(api, "leader", "a", wall_clock=lambda: 1_800_000_000.0)
    await whole.try_once()
    assert server.leases["leader"]["spec"]["renewTime"] == "2027-01-15T08:00:00.000001+00:00"


async def test_a_conflict_costs_a_turn_and_not_the_lease(
    server: KubernetesServer, api: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = keeper(api, "a")
    await a.try_once()
    until_then = a.lease().ttl_s
    read = api.read_lease

    async def read_and_be_late(name: str) -> Any:
        found = await read(name)
        server.touch_lease(name)  # somebody labels the object between our read and our write
        return found

    monkeypatch.setattr(api, "read_lease", read_and_be_late)
    await a.try_once()
    assert a.lease().holder == "a"
    assert 0 < a.lease().ttl_s <= until_then, "not renewed"
    monkeypatch.setattr(api, "read_lease", read)
    await a.try_once()
    assert a.lease().ttl_s > until_then - 0.5


@pytest.mark.parametrize("fault", [500, 502, 429, 403, 0])
async def test_a_server_that_fails_leaves_the_holder_its_time_and_no_more(
    server: KubernetesServer, api: KubernetesApi, fault: int
) -> None:
    a = keeper(api, "a")
    await a.try_once()
    me = Leadership("a")
    asked_at = time.monotonic()
    me.answered(a.lease(), asked_at)
    assert me.epoch(time.monotonic()) == 1
    server.faults.extend([fault] * 200)
    running = asyncio.create_task(a.run())
    await until(lambda: a.lease().ttl_s == 0.0)
    assert time.monotonic() - asked_at <= DURATION_S + 0.3
    me.answered(a.lease(), time.monotonic())
    assert me.epoch(time.monotonic()) == 0
    server.faults.clear()
    await until(lambda: a.lease().ttl_s > 0)
    running.cancel()
    assert a.lease().epoch == 1, "nobody else led meanwhile"


async def test_a_slow_answer_counts_from_the_request(
    server: KubernetesServer, api: KubernetesApi
) -> None:
    a = keeper(api, "a")
    server.delay_s = 0.4
    await a.try_once()  # a read and a write, 0.4 s each
    assert a.lease().ttl_s <= DURATION_S - 0.4


async def test_an_answer_that_never_comes_is_given_up(
    server: KubernetesServer, api: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_api, "REQUEST_TIMEOUT_S", 0.2)
    server.delay_s = 5.0
    with pytest.raises(Unavailable, match="does not answer"):
        await api.read_lease("leader")


async def test_a_third_candidate_wins_after_the_holder_dies(
    server: KubernetesServer, api: KubernetesApi
) -> None:
    a, b, c = (keeper(api, name) for name in "abc")
    await a.try_once()
    tasks = [asyncio.create_task(each.run()) for each in (b, c)]
    await until(lambda: b.lease().ttl_s > 0 or c.lease().ttl_s > 0, timeout_s=DURATION_S + 3)
    await asyncio.sleep(0.2)
    leading = [each for each in (b, c) if each.lease().ttl_s > 0]
    assert len(leading) == 1
    assert leading[0].lease().epoch == 2
    await asyncio.gather(*(_cancelled(task) for task in tasks))


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def test_the_catalog_takes_the_elected_leader_and_refuses_the_one_before(
    server: KubernetesServer, api: KubernetesApi, tmp_path: Any
) -> None:
    store = SqliteCatalog(str(tmp_path))
    for _ in range(3):  # epochs that the embedded catalog counted before
        await store.close()
        store = SqliteCatalog(str(tmp_path))
    a, b = keeper(api, "a"), keeper(api, "b")
    led_by_a, led_by_b = ElectedCatalog(store, a), ElectedCatalog(store, b)
    me = Leadership("a")

    async def beat_of_a() -> int:
        asked_at = time.monotonic()
        me.answered((await led_by_a.beat("a", 0, me.known_epoch)).lease, asked_at)
        return me.epoch(time.monotonic())

    await a.try_once()
    assert await beat_of_a() == 0, "the catalog knows a higher epoch: not yet"
    await a.try_once()
    epoch = await beat_of_a()
    assert epoch > 3
    await led_by_a.put_nodes({"n": "h:1"}, epoch=epoch)
    await a.release()
    await b.try_once()
    new = (await led_by_b.beat("b", 0)).lease
    assert (new.holder, new.epoch) == ("b", epoch + 1)
    with pytest.raises(Aborted, match="has passed"):
        await led_by_a.put_nodes({}, epoch=epoch)
    await led_by_b.put_nodes({"n": "h:2"}, epoch=new.epoch)
    assert await led_by_a.nodes() == {"n": "h:2"}
    await store.close()


# Endpoint slices.


async def informer(
    server: KubernetesServer, api: KubernetesApi
) -> tuple[EndpointInformer, list[str], asyncio.Task[None]]:
    gone: list[str] = []
    made = EndpointInformer(api, "nodes", gone.append, pause_s=0.01)
    task = asyncio.create_task(made.run())
    await server.watched()
    return made, gone, task


async def test_pods_come_and_go_with_their_zones(
    server: KubernetesServer, api: KubernetesApi
) -> None:
    server.put_slice("nodes-1", "nodes", {"n-0": "a", "n-1": "b"})
    server.put_slice("other-1", "other", {"x-0": "z"})
    made, gone, task = await informer(server, api)
    assert made.endpoints.pods() == {"n-0", "n-1"}
    server.put_slice("nodes-2", "nodes", {"n-2": "c"})
    await until(lambda: made.endpoints.pods() == {"n-0", "n-1", "n-2"})
    server.put_slice("other-1", "other", {})
    server.put_slice("nodes-1", "nodes", {"n-0": "a"})
    server.delete_slice("nodes-2")
    await until(lambda: gone == ["n-1", "n-2"])
    assert [made.endpoints.zone(pod) for pod in ("n-0", "n-1", "n-2", "x-0")] == ["a", "b", "c", ""]
    assert server.lists == 1
    await _cancelled(task)


async def test_every_watch_has_a_timeout_on_both_sides(
    server: KubernetesServer, api: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_api, "WATCH_S", 1)
    monkeypatch.setattr(kubernetes_api, "WATCH_GRACE_S", -0.8)
    made, _, task = await informer(server, api)
    # The server says nothing at all: the client's own timeout ends the watch, and it goes on.
    await until(
        lambda: (
            sum(query.get("watch") in ("1", "true", "True") for _, _, query in server.requests) >= 3
        )
    )
    (first,) = {query["timeoutSeconds"] for _, _, query in server.requests if "watch" in query}
    assert first == "1"
    server.put_slice("nodes-1", "nodes", {"n-0": ""})
    await until(lambda: made.endpoints.pods() == {"n-0"})
    await _cancelled(task)


async def test_a_watch_that_ends_or_breaks_goes_on_from_where_it_was(
    server: KubernetesServer, api: KubernetesApi
) -> None:
    server.put_slice("nodes-1", "nodes", {"n-0": "", "n-1": ""})
    made, gone, task = await informer(server, api)
    for interrupt in (server.end_watches, server.break_watches):
        interrupt()
        await until(lambda: not server._watches)
        pods = {"n-0": ""} if "n-1" in made.endpoints.pods() else {}
        server.put_slice("nodes-1", "nodes", pods)  # while nobody watches
        await until(lambda pods=pods: made.endpoints.pods() == set(pods))
        await server.watched()
    assert gone == ["n-1", "n-0"]
    assert server.lists == 1, "nothing was listed again"
    await _cancelled(task)


async def test_a_bookmark_moves_the_place_on_so_that_compaction_does_no_harm(
    server: KubernetesServer, api: KubernetesApi
) -> None:
    _, _, task = await informer(server, api)
    for n in range(20):  # other services' slices: this watch is not told of them
        server.put_slice("other-1", "other", {f"x-{n}": ""})
    server.bookmark()
    await asyncio.sleep(0.05)
    server.compact()
    server.end_watches()
    await until(lambda: not server._watches)
    await server.watched()
    await asyncio.sleep(0.05)
    assert server.lists == 1
    await _cancelled(task)


async def test_history_that_is_gone_is_listed_again(
    server: KubernetesServer, api: KubernetesApi
) -> None:
    server.put_slice("nodes-1", "nodes", {"n-0": "", "n-1": ""})
    made, gone, task = await informer(server, api)
    server.break_watches()
    server.put_slice("nodes-1", "nodes", {"n-0": ""})
    server.put_slice("other-1", "other", {})
    server.compact()
    await until(lambda: gone == ["n-1"])
    assert server.lists == 2
    assert made.endpoints.pods() == {"n-0"}
    await _cancelled(task)


@pytest.mark.parametrize("fault", [500, 502, 429, 410, 403, 0])
async def test_faults_are_waited_out(
    server: KubernetesServer, api: KubernetesApi, fault: int
) -> None:
    server.faults.extend([fault] * 3)
    server.put_slice("nodes-1", "nodes", {"n-0": ""})
    gone: list[str] = []
    made = EndpointInformer(api, "nodes", gone.append, pause_s=0.01)
    task = asyncio.create_task(made.run())
    await until(lambda: made.endpoints.pods() == {"n-0"})
    await server.watched()
    server.faults.extend([fault] * 3)
    server.end_watches()
    server.put_slice("nodes-1", "nodes", {"n-1": ""})
    await until(lambda: made.endpoints.pods() == {"n-1"})
    assert gone == ["n-0"]
    assert len(server.requests) < 30, "no busy loop"
    await _cancelled(task)


# The size of the set.


def node_report(name: str, used_bytes: int, limit_bytes: int = 100) -> Heartbeat:
    double = FakeNode(name)
    stats = double.stats()
    stats = dataclasses.replace(
        stats,
        context_bytes=used_bytes,
        index_bytes=0,
        tail_bytes=0,
        sessions=0,
        memory_limit_bytes=limit_bytes,
    )
    return Heartbeat(name, 1, "h:1", node=stats)


class Scene:
    """A scaler over a cluster whose members report what the test says."""

    def __init__(self, server: KubernetesServer, api: KubernetesApi) -> None:
        self.cluster, self.refused = Cluster(), 0
        self.leading, self.now, self.server = True, 0.0, server
        self.scaler = NodeScaler(
            api,
            "node",
            Rules(2, 4, in_after_s=0),
            self.evacuate,
            members=self.cluster.members,
            leads=lambda: self.leading,
            refused_bytes=lambda: self.refused,
            clock=lambda: self.now,
        )

    def evacuate(self, node_id: str) -> None:
        self.cluster.apply(Drain(node_id), self.now)

    async def turn(self, *used_bytes: int) -> Any:
        for ordinal, each in enumerate(used_bytes):
            self.cluster.apply(node_report(f"node-{ordinal}", each), self.now)
        return await self.scaler.decide_once()

    @property
    def replicas(self) -> int:
        size: int = self.server.scales["node"]["spec"]["replicas"]
        return size


async def test_the_set_follows_memory_out_and_in(
    server: KubernetesServer, api: KubernetesApi
) -> None:
    server.put_scale("node", 2)
    scene = Scene(server, api)
    assert isinstance(await scene.turn(90, 90), Grow)
    assert scene.replicas == 3
    assert isinstance(await scene.turn(90, 90), Wait), "node-2 has not reported"
    assert isinstance(await scene.turn(60, 60, 60), Wait)
    assert isinstance(await scene.turn(20, 20, 20), Evacuate)
    assert isinstance(await scene.turn(30, 25, 5), Wait)
    scene.refused = 10
    assert isinstance(await scene.turn(30, 25, 5), Keep)
    scene.refused = 0
    assert isinstance(await scene.turn(20, 20, 20), Evacuate)
    assert isinstance(await scene.turn(30, 30, 0), Shrink)
    assert scene.replicas == 2
    assert server.deleted_pods == ["node-2"], "a drain ends with the process only"
    drained = scene.cluster.member("node-2")
    assert drained is not None
    assert drained.draining
    await api.restart_pod("gone")  # no pod is no error


async def test_only_the_leader_sizes_the_set(server: KubernetesServer, api: KubernetesApi) -> None:
    server.put_scale("node", 2)
    scene = Scene(server, api)
    scene.leading = False
    assert isinstance(await scene.turn(90, 90), Wait)
    assert scene.replicas == 2
    assert not server.requests


async def test_a_size_that_somebody_changed_meanwhile_is_theirs(
    server: KubernetesServer, api: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put_scale("node", 2)
    scene = Scene(server, api)
    read = api.read_scale

    async def read_and_be_late(name: str) -> SetScale:
        found = await read(name)
        server.put_scale(name, 4)
        return found

    monkeypatch.setattr(api, "read_scale", read_and_be_late)
    assert isinstance(await scene.turn(90, 90), Wait)
    assert scene.replicas == 4


@pytest.mark.parametrize("fault", [500, 404, 403, 0])
async def test_a_failing_api_changes_nothing(
    server: KubernetesServer, api: KubernetesApi, fault: int
) -> None:
    server.put_scale("node", 2)
    scene = Scene(server, api)
    # The client package itself tries once more where a connection ends.
    server.faults.extend([fault] * (2 if fault == 0 else 1))
    assert isinstance(await scene.turn(90, 90), Wait)
    assert scene.replicas == 2
    assert isinstance(await scene.turn(90, 90), Grow)


# Errors, and the whole coordinator.


async def test_errors_are_this_projects_own(server: KubernetesServer, api: KubernetesApi) -> None:
    with pytest.raises(NotFound, match='statefulsets "none" not found'):
        await api.read_scale("none")
    server.faults.append(403)
    with pytest.raises(PermissionDenied, match=r"kubernetes\.enabled"):
        await api.read_scale("none")


def test_outside_a_cluster_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(InvalidRequest, match="set kubernetes_server"):
        KubernetesApi()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scale_nodes_min": 4, "scale_nodes_max": 3}, "min <= max"),
        ({"scale_in_below": 0.9}, "below < above"),
    ],
)
def test_contradicting_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        CoordinatorConfig(cluster_secret=SECRET, **settings)


async def test_a_coordinator_leads_by_the_lease_and_hears_of_pods(
    server: KubernetesServer,
) -> None:
    server.put_slice("nodes-1", "nodes", {"n-0": "zone-a", "n-1": "zone-b"})
    config = CoordinatorConfig(
        cluster_secret=SECRET,
        coordinator_id="c-0",
        kubernetes_server=server.url,
        kubernetes_namespace="ai",
        kubernetes_lease="leader",
        kubernetes_node_service="nodes",
    )
    coordinator = Coordinator(config)
    await coordinator.start()
    await server.watched()
    await until(lambda: "leader" in server.leases)
    assert server.leases["leader"]["spec"]["holderIdentity"] == "c-0"
    await until(coordinator.contexts.leads)
    for name in ("n-0", "n-1"):
        coordinator.heartbeat(node_report(name, 0))
    members = coordinator._cluster
    zones = [members.member(name).report.zone for name in ("n-0", "n-1")]  # type: ignore[union-attr]
    assert zones == ["zone-a", "zone-b"]
    server.put_slice("nodes-1", "nodes", {"n-0": "zone-a"})
    await until(lambda: members.member("n-1").state is MemberState.SUSPECT)  # type: ignore[union-attr]
    coordinator.heartbeat(node_report("n-1", 0))
    assert members.member("n-1").state is MemberState.ALIVE, "heartbeats are the truth"  # type: ignore[union-attr]
    await coordinator.drain()
    await coordinator.close()
    assert server.leases["leader"]["spec"]["holderIdentity"] == ""


async def test_a_coordinator_starts_and_serves_while_kubernetes_is_away() -> None:
    config = CoordinatorConfig(
        cluster_secret=SECRET,
        kubernetes_server="http://127.0.0.1:1",
        kubernetes_lease="leader",
        kubernetes_node_service="nodes",
        kubernetes_node_set="node",
    )
    coordinator = Coordinator(config)
    began = time.monotonic()
    await coordinator.start()
    coordinator.heartbeat(node_report("n-0", 0))
    status = await coordinator.status()
    assert [member.member_id for member in status.members] == ["n-0"]
    assert not coordinator.contexts.leads()
    assert time.monotonic() - began < 3
    await coordinator.close()
