"""A Kubernetes API server as far as the coordinator goes: leases, endpoint slices, scales.

It speaks the wire format of the API reference over HTTP (paths, Status objects, resource versions,
watches as lines of JSON, MicroTime with six decimals) and fails the way API servers do: conflicts
on an old resource version, 410 for history that is compacted, watches that end or break, 500s, slow
answers.
"""

from __future__ import annotations

import asyncio
import copy
import json
import re
from collections import deque
from typing import Any

from aiohttp import web

Object = dict[str, Any]
MICRO_TIME = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)$")
SLICES = "/apis/discovery.k8s.io/v1/namespaces/ai/endpointslices"
LEASES = "/apis/coordination.k8s.io/v1/namespaces/ai/leases"
PODS = "/api/v1/namespaces/ai/pods"
SCALE = "/apis/apps/v1/namespaces/ai/statefulsets/{name}/scale"


class KubernetesServer:
    """Objects of the namespace `ai`, and the faults that tests ask for.

    `faults` holds statuses that the next requests get in place of an answer; `delay_s` holds up
    every answer; `requests` records (method, path, query) of all that came.
    """

    def __init__(self) -> None:
        self.url = ""
        self.leases: dict[str, Object] = {}
        self.slices: dict[str, Object] = {}
        self.scales: dict[str, Object] = {}
        self.faults: deque[int] = deque()
        self.delay_s = 0.0
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.lists = 0
        self.deleted_pods: list[str] = []
        self._version = 100
        self._history: list[tuple[int, Object]] = []
        self._compacted = 0
        self._watches: set[_Watch] = set()
        self._runner: web.AppRunner | None = None

    # What tests do.

    async def start(self) -> None:
        app = web.Application(middlewares=[self._faulty])
        app.router.add_get(LEASES + "/{name}", self._get_lease)
        app.router.add_post(LEASES, self._create_lease)
        app.router.add_put(LEASES + "/{name}", self._replace_lease)
        app.router.add_get(SLICES, self._list_or_watch)
        app.router.add_get(SCALE, self._get_scale)
        app.router.add_put(SCALE, self._replace_scale)
        app.router.add_delete(PODS + "/{name}", self._delete_pod)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        self.end_watches()
        assert self._runner is not None
        await self._runner.cleanup()

    def put_slice(self, name: str, service: str, pods: dict[str, str]) -> None:
        """Creates or replaces a slice; `pods` maps names to zones."""
        kind = "MODIFIED" if name in self.slices else "ADDED"
        endpoints = [_endpoint(pod, zone) for pod, zone in pods.items()]
        self.slices[name] = {
            "addressType": "IPv4",
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": name,
                "namespace": "ai",
                "labels": {
                    "kubernetes.io/service-name": service,
                    "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                },
                "resourceVersion": self._next(),
            },
            "endpoints": endpoints or None,  # a slice without any has null, as Go encodes it
            "ports": [{"name": "grpc", "port": 7500, "protocol": "TCP"}],
        }
        self._happened(kind, self.slices[name])

    def delete_slice(self, name: str) -> None:
        gone = self.slices.pop(name)
        gone["metadata"]["resourceVersion"] = self._next()
        self._happened("DELETED", gone)

    def put_scale(self, name: str, replicas: int) -> None:
        self.scales[name] = {
            "kind": "Scale",
            "apiVersion": "autoscaling/v1",
            "metadata": {"name": name, "namespace": "ai", "resourceVersion": self._next()},
            "spec": {"replicas": replicas},
            "status": {"replicas": replicas, "selector": "app=node"},
        }

    def touch_lease(self, name: str, **spec: Any) -> None:
        """Another client changes a Lease."""
        self.leases[name]["spec"].update(spec)
        self.leases[name]["metadata"]["resourceVersion"] = self._next()

    def bookmark(self) -> None:
        """Tells watches how far they are."""
        metadata = {"resourceVersion": self._next(), "creationTimestamp": None}
        line = {"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1", "metadata": metadata}
        for watch in self._watches:
            watch.send({"type": "BOOKMARK", "object": line})

    def compact(self) -> None:
        """Forgets history: a watch from before gets 410."""
        self._compacted = self._version

    def end_watches(self) -> None:
        """Ends every watch in order, as after timeoutSeconds."""
        for watch in list(self._watches):
            watch.lines.put_nowait(None)

    def break_watches(self) -> None:
        """Cuts the connections of every watch."""
        for watch in list(self._watches):
            watch.cut()

    async def watched(self, count: int = 1) -> None:
        """Waits until so many watches are open."""
        async with asyncio.timeout(5):
            while len(self._watches) < count:
                await asyncio.sleep(0.005)

    # Answers.

    @web.middleware
    async def _faulty(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append((request.method, request.path, dict(request.query)))
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.faults:
            status = self.faults.popleft()
            if status == 0:  # the connection ends without an answer
                assert request.transport is not None
                request.transport.abort()
                raise asyncio.CancelledError
            if status == 502:  # from a load balancer, not from the API
                return web.Response(status=502, text="<html>Bad Gateway</html>")
            return _status(status, "InternalError", "etcdserver: request timed out")
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _get_lease(self, request: web.Request) -> web.Response:
        found = self.leases.get(request.match_info["name"])
        return _missing("leases", request) if found is None else _json(found)

    async def _create_lease(self, request: web.Request) -> web.Response:
        lease = await request.json()
        name = lease["metadata"]["name"]
        if name in self.leases:
            return _status(409, "AlreadyExists", f'leases "{name}" already exists')
        return self._store_lease(name, lease, 201)

    async def _replace_lease(self, request: web.Request) -> web.Response:
        lease, name = await request.json(), request.match_info["name"]
        if name not in self.leases:
            return _missing("leases", request)
        if lease["metadata"]["resourceVersion"] != self._version_of(self.leases[name]):
            return _modified("leases.coordination.k8s.io", name)
        return self._store_lease(name, lease, 200)

    def _store_lease(self, name: str, lease: Object, status: int) -> web.Response:
        spec = lease["spec"]
        for field in ("acquireTime", "renewTime"):
            if not MICRO_TIME.match(spec[field]):
                return _status(400, "BadRequest", f'parsing time "{spec[field]}" as RFC3339Micro')
        if not isinstance(spec["leaseDurationSeconds"], int) or spec["leaseDurationSeconds"] < 1:
            return _status(422, "Invalid", "leaseDurationSeconds: must be greater than 0")
        lease["metadata"]["resourceVersion"] = self._next()
        self.leases[name] = lease
        return _json(lease, status)

    async def _list_or_watch(self, request: web.Request) -> web.StreamResponse:
        key, _, service = request.query.get("labelSelector", "").partition("=")
        assert key == "kubernetes.io/service-name"
        if request.query.get("watch") in ("1", "true", "True"):
            return await self._watch(request, service)
        self.lists += 1
        found = [each for each in self.slices.values() if _service_of(each) == service]
        return _json(
            {
                "kind": "EndpointSliceList",
                "apiVersion": "discovery.k8s.io/v1",
                "metadata": {"resourceVersion": str(self._version)},
                "items": found or None,
            }
        )

    async def _watch(self, request: web.Request, service: str) -> web.StreamResponse:
        since = int(request.query["resourceVersion"])
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        watch = _Watch(request, service)
        if since < self._compacted:
            expired = _status_body(410, "Expired", f"too old resource version: {since}")
            watch.send({"type": "ERROR", "object": expired})
            watch.lines.put_nowait(None)
        for version, event in self._history:
            if version > since:
                watch.send(event)
        self._watches.add(watch)
        try:
            while (line := await watch.lines.get()) is not None:
                await response.write(line)
            await response.write_eof()
        finally:
            self._watches.discard(watch)
        return response

    async def _get_scale(self, request: web.Request) -> web.Response:
        found = self.scales.get(request.match_info["name"])
        return _missing("statefulsets", request) if found is None else _json(found)

    async def _replace_scale(self, request: web.Request) -> web.Response:
        scale, name = await request.json(), request.match_info["name"]
        if scale["metadata"].get("resourceVersion") != self._version_of(self.scales[name]):
            return _modified("statefulsets.apps", name)
        self.scales[name]["spec"]["replicas"] = scale["spec"]["replicas"]
        self.scales[name]["metadata"]["resourceVersion"] = self._next()
        return _json(self.scales[name])

    async def _delete_pod(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self.deleted_pods.append(name)
        if not name.startswith("node-"):
            return _missing("pods", request)
        metadata = {"name": name, "deletionTimestamp": "2026-01-01T00:00:00Z"}
        return _json({"kind": "Pod", "apiVersion": "v1", "metadata": metadata})

    def _next(self) -> str:
        self._version += 1
        return str(self._version)

    def _happened(self, kind: str, found: Object) -> None:
        event = {"type": kind, "object": copy.deepcopy(found)}
        self._history.append((self._version, event))
        for watch in self._watches:
            watch.send(event)

    @staticmethod
    def _version_of(found: Object) -> str:
        version: str = found["metadata"]["resourceVersion"]
        return version


class _Watch:
    def __init__(self, request: web.Request, service: str) -> None:
        self.lines: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._request = request
        self._service = service

    def send(self, event: Object) -> None:
        is_slice = "labels" in event["object"].get("metadata", {})
        if not is_slice or _service_of(event["object"]) == self._service:
            self.lines.put_nowait(json.dumps(event).encode() + b"\n")

    def cut(self) -> None:
        if self._request.transport is not None:
            self._request.transport.abort()


def _service_of(found: Object) -> str:
    service: str = found["metadata"]["labels"]["kubernetes.io/service-name"]
    return service


def _endpoint(pod: str, zone: str) -> Object:
    endpoint = {
        "addresses": ["10.0.0.7"],
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "hostname": pod,
        "nodeName": "machine-1",
        "targetRef": {"kind": "Pod", "name": pod, "namespace": "ai", "uid": "1"},
    }
    return endpoint | ({"zone": zone} if zone else {})


def _json(body: Object, status: int = 200) -> web.Response:
    return web.json_response(body, status=status)


def _status_body(code: int, reason: str, message: str) -> Object:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": code,
    }


def _status(code: int, reason: str, message: str) -> web.Response:
    return _json(_status_body(code, reason, message), code)


def _missing(kind: str, request: web.Request) -> web.Response:
    return _status(404, "NotFound", f'{kind} "{request.match_info["name"]}" not found')


def _modified(kind: str, name: str) -> web.Response:
    said = f'Operation cannot be fulfilled on {kind} "{name}": the object has been modified'
    return _status(409, "Conflict", said)
