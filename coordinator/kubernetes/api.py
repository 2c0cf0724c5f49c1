"""The Kubernetes API as the coordinator uses it: leases, endpoint slices, the size of a set.

The one place of this package that performs I/O. Objects come and go as the value types of the
pure parts. Every request has a `_request_timeout`, watches too: without one, a connection that a
firewall dropped silently would be waited on for good. The client package takes a second to import,
so that only a coordinator that uses it pays.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.kubernetes.election import LeaseObject
from coordinator.kubernetes.endpoints import Endpoint, SliceEvent
from longreach.errors import (
    Aborted,
    InvalidRequest,
    LongreachError,
    NotFound,
    PermissionDenied,
    Unavailable,
)

REQUEST_TIMEOUT_S = 3.0
"""Shorter than the time between two renewals of a lease and its end."""
WATCH_S = 240
"""The server ends a watch after this long, as the API's own clients ask it to."""
WATCH_GRACE_S = 30.0
EPOCH_ANNOTATION = "longreach.io/fencing-epoch"
SERVICE_LABEL = "kubernetes.io/service-name"
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class Expired(Exception):
    """The watch's place in history is no longer kept (410): list again."""


@dataclass(frozen=True, slots=True)
class SliceList:
    """All slices of a service and the version from which to watch."""

    slices: tuple[SliceEvent, ...]
    version: str


@dataclass(frozen=True, slots=True)
class SetScale:
    """The size that a StatefulSet is asked to have; `version` guards a change."""

    replicas: int
    version: str


class KubernetesApi:
    """The objects of one namespace.

    Methods raise Unavailable while the API does not answer or answers with a fault of its own,
    Aborted where another client was faster, NotFound, and PermissionDenied where the service
    account lacks a right.
    """

    def __init__(self, server: str = "", namespace: str = "") -> None:
        import aiohttp
        from kubernetes.aio import client, config

        configuration = client.Configuration()
        if server:
            configuration.host = server.rstrip("/")
        else:
            try:
                config.load_incluster_config(client_configuration=configuration)
            except config.ConfigException as problem:
                raise InvalidRequest(
                    f"no Kubernetes API: {problem} Run in a pod with its service account's token "
                    "mounted, set kubernetes_server, or turn the kubernetes_ settings off"
                ) from None
        self.namespace = namespace or _own_namespace()
        self._refused = client.ApiException
        self._broken = (OSError, TimeoutError, ValueError, aiohttp.ClientError)
        self._client = client.ApiClient(configuration)
        self._leases = client.CoordinationV1Api(self._client)
        self._slices = client.DiscoveryV1Api(self._client)
        self._sets = client.AppsV1Api(self._client)
        self._pods = client.CoreV1Api(self._client)

    async def close(self) -> None:
        """Ends the connections."""
        await self._client.close()

    async def read_lease(self, name: str) -> LeaseObject:
        """A Lease; an empty one where there is none."""
        try:
            found = await self._ask(
                self._leases.read_namespaced_lease_without_preload_content, name, self.namespace
            )
        except NotFound:
            return LeaseObject()
        return _lease_from(found)

    async def write_lease(self, name: str, lease: LeaseObject) -> LeaseObject:
        """Creates a Lease, or replaces the version that `lease` names; returns it as stored."""
        body = _lease_body(name, self.namespace, lease)
        if lease.version:
            call = self._leases.replace_namespaced_lease_without_preload_content
            return _lease_from(await self._ask(call, name, self.namespace, body))
        call = self._leases.create_namespaced_lease_without_preload_content
        return _lease_from(await self._ask(call, self.namespace, body))

    async def list_slices(self, service: str) -> SliceList:
        """The endpoint slices of a service."""
        found = await self._ask(
            self._slices.list_namespaced_endpoint_slice_without_preload_content,
            self.namespace,
            label_selector=f"{SERVICE_LABEL}={service}",
        )
        version = found["metadata"]["resourceVersion"]
        return SliceList(tuple(map(_slice_from, found.get("items") or ())), version)

    async def watch_slices(
        self, service: str, version: str
    ) -> AsyncGenerator[tuple[SliceEvent | None, str]]:
        """What changes after `version`: each event (None for a bookmark) with the version to go on
        from. Ends when the server ends the watch; raises Expired where it cannot go on."""
        call = self._slices.list_namespaced_endpoint_slice_without_preload_content
        with self._translated():
            response = await call(
                self.namespace,
                label_selector=f"{SERVICE_LABEL}={service}",
                watch=True,
                resource_version=version,
                allow_watch_bookmarks=True,
                timeout_seconds=WATCH_S,
                _request_timeout=WATCH_S + WATCH_GRACE_S,
            )
            with contextlib.closing(response):
                if response.status == 410:
                    raise Expired
                if response.status != 200:
                    raise _meaning(response.status, (await response.read()).decode())
                async for line in response.content:
                    yield _event_from(json.loads(line))

    async def read_scale(self, name: str) -> SetScale:
        """The size of a StatefulSet."""
        call = self._sets.read_namespaced_stateful_set_scale_without_preload_content
        found = await self._ask(call, name, self.namespace)
        return SetScale(found["spec"].get("replicas", 0), found["metadata"]["resourceVersion"])

    async def write_scale(self, name: str, scale: SetScale) -> None:
        """Sizes a StatefulSet, unless somebody else did since it was read."""
        body = {
            "apiVersion": "autoscaling/v1",
            "kind": "Scale",
            "metadata": {
                "name": name,
                "namespace": self.namespace,
                "resourceVersion": scale.version,
            },
            "spec": {"replicas": scale.replicas},
        }
        call = self._sets.replace_namespaced_stateful_set_scale_without_preload_content
        await self._ask(call, name, self.namespace, body)

    async def restart_pod(self, name: str) -> None:
        """Deletes a pod of a set, which then makes it anew; no pod is no error."""
        with contextlib.suppress(NotFound):
            await self._ask(
                self._pods.delete_namespaced_pod_without_preload_content, name, self.namespace
            )

    async def _ask(self, call: Callable[..., Awaitable[Any]], *values: Any, **options: Any) -> Any:
        """One request; the answer's JSON."""
        with self._translated():
            response = await call(*values, _request_timeout=REQUEST_TIMEOUT_S, **options)
            text = (await response.read()).decode()
            if not 200 <= response.status < 300:
                raise _meaning(response.status, text)
            return json.loads(text)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Errors of the client package and of the network as this project's own."""
        try:
            yield
        except self._refused as fault:
            raise _meaning(fault.status, fault.body or str(fault.reason)) from None
        except self._broken as problem:
            raise Unavailable(
                f"the Kubernetes API does not answer ({type(problem).__name__}: {problem})",
                reason="KUBERNETES_UNAVAILABLE",
                retry_after_s=1.0,
            ) from None


def _meaning(status: int, text: str) -> LongreachError:
    """The error that a status stands for; `text` is a Status object, where the API sent one."""
    with contextlib.suppress(ValueError, AttributeError):
        text = json.loads(text).get("message", text)
    said = f"the Kubernetes API answered {status}: {text[:300]}"
    if status == 404:
        return NotFound(said, reason="NO_KUBERNETES_OBJECT")
    if status == 409:
        return Aborted(said, reason="KUBERNETES_CONFLICT")
    if status in (401, 403):
        return PermissionDenied(
            f"{said}. The chart's Role grants what is needed where kubernetes.enabled is set",
            reason="KUBERNETES_FORBIDDEN",
        )
    return Unavailable(said, reason="KUBERNETES_UNAVAILABLE", retry_after_s=1.0)


def timestamp(now: float) -> str:
    """Unix seconds as the API's MicroTime."""
    return datetime.datetime.fromtimestamp(now, datetime.UTC).isoformat()


def _micro_time(text: str) -> datetime.datetime:
    """A MicroTime to send. The API refuses one without six decimals and the client package leaves
    them out on a whole second, so that there is none."""
    moment = datetime.datetime.fromisoformat(text)
    return moment.replace(microsecond=max(1, moment.microsecond))


def _own_namespace() -> str:
    try:
        return _NAMESPACE_FILE.read_text().strip()
    except OSError:
        return "default"


def _lease_from(found: dict[str, Any]) -> LeaseObject:
    spec = found.get("spec") or {}
    metadata = found["metadata"]
    epoch = (metadata.get("annotations") or {}).get(EPOCH_ANNOTATION, "0")
    return LeaseObject(
        holder=spec.get("holderIdentity") or "",
        epoch=int(epoch) if epoch.isdigit() else 0,
        duration_s=float(spec.get("leaseDurationSeconds") or 1),
        transitions=spec.get("leaseTransitions") or 0,
        acquired_at=spec.get("acquireTime") or "",
        renewed_at=spec.get("renewTime") or "",
        version=metadata["resourceVersion"],
    )


def _lease_body(name: str, namespace: str, lease: LeaseObject) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": namespace,
        "annotations": {EPOCH_ANNOTATION: str(lease.epoch)},
    }
    if lease.version:
        metadata["resourceVersion"] = lease.version
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": metadata,
        "spec": {
            "holderIdentity": lease.holder,
            "leaseDurationSeconds": int(lease.duration_s),
            "acquireTime": _micro_time(lease.acquired_at),
            "renewTime": _micro_time(lease.renewed_at),
            "leaseTransitions": lease.transitions,
        },
    }


def _slice_from(found: dict[str, Any]) -> SliceEvent:
    endpoints = []
    for each in found.get("endpoints") or ():
        pod = (each.get("targetRef") or {}).get("name") or each.get("hostname") or ""
        if pod:
            serving = (each.get("conditions") or {}).get("serving")
            # Unknown is to be read as serving (discovery.k8s.io/v1).
            endpoints.append(Endpoint(pod, each.get("zone") or "", serving is not False))
    return SliceEvent(found["metadata"]["name"], tuple(endpoints))


def _event_from(event: dict[str, Any]) -> tuple[SliceEvent | None, str]:
    """A line of a watch: the slice as it is now, and the version to go on from."""
    kind, found = event["type"], event["object"]
    if kind == "ERROR":
        if found.get("code") == 410:
            raise Expired
        raise Unavailable(
            f"the Kubernetes API ended the watch: {found.get('message')}",
            reason="KUBERNETES_UNAVAILABLE",
        )
    version = found["metadata"]["resourceVersion"]
    if kind == "BOOKMARK":
        return None, version
    now = _slice_from(found)
    return (SliceEvent(now.name) if kind == "DELETED" else now), version
