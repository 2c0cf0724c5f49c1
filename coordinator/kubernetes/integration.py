"""The Kubernetes integration put together from the coordinator's settings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from coordinator.catalog.base import Catalog
from coordinator.cluster import Member
from coordinator.config import CoordinatorConfig
from coordinator.kubernetes.api import KubernetesApi
from coordinator.kubernetes.elected_catalog import ElectedCatalog
from coordinator.kubernetes.informer import EndpointInformer
from coordinator.kubernetes.lease_keeper import LeaseKeeper
from coordinator.kubernetes.scaler import NodeScaler
from coordinator.kubernetes.scaling import Rules


class KubernetesIntegration:
    """The parts that a configuration turns on, each in a task of its own.

    None of them is waited for by anything else in the coordinator.
    """

    def __init__(self, config: CoordinatorConfig, api: KubernetesApi | None = None) -> None:
        self._config = config
        self._api = api or KubernetesApi(config.kubernetes_server, config.kubernetes_namespace)
        self._keeper: LeaseKeeper | None = None
        self._informer: EndpointInformer | None = None
        self._scaler: NodeScaler | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def elects(self, catalog: Catalog) -> Catalog:
        """The catalog, led by the holder of the Lease where one is set."""
        if not self._config.kubernetes_lease:
            return catalog
        self._keeper = LeaseKeeper(self._api, self._config.kubernetes_lease, self._config.name)
        return ElectedCatalog(catalog, self._keeper)

    def hints(self, on_gone: Callable[[str], None]) -> None:
        """`on_gone` is told of nodes whose pod vanished, where a service is set."""
        service = self._config.kubernetes_node_service
        if service:
            self._informer = EndpointInformer(self._api, service, on_gone)

    def scales(
        self,
        members: Callable[[], Iterable[Member]],
        leads: Callable[[], bool],
        refused_bytes: Callable[[], int],
        evacuate: Callable[[str], None],
    ) -> None:
        """Sizes the set of the nodes, where one is set."""
        config = self._config
        if not config.kubernetes_node_set:
            return
        rules = Rules(
            config.scale_nodes_min,
            config.scale_nodes_max,
            config.scale_out_above,
            config.scale_in_below,
            config.scale_in_after_s,
        )
        self._scaler = NodeScaler(
            self._api,
            config.kubernetes_node_set,
            rules,
            evacuate,
            members=members,
            leads=leads,
            refused_bytes=refused_bytes,
        )

    def zone(self, member_id: str) -> str:
        """The zone of a node's pod; empty where it is not known."""
        return self._informer.endpoints.zone(member_id) if self._informer else ""

    def start(self) -> None:
        """Begins, with an event loop running."""
        for part in (self._keeper, self._informer, self._scaler):
            if part is not None:
                self._tasks.append(asyncio.create_task(part.run()))

    async def close(self) -> None:
        """Ends the tasks and gives the Lease up."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._keeper is not None:
            await self._keeper.release()
        await self._api.close()
