"""Settings of the Kubernetes integration; empty names turn its parts off."""

from __future__ import annotations

from dataclasses import dataclass

from longreach.config import setting
from longreach.errors import InvalidRequest


@dataclass(frozen=True)
class KubernetesSettings:
    """What the coordinator asks the Kubernetes API for."""

    kubernetes_server: str = setting(
        "",
        "URL of the Kubernetes API, such as that of kubectl proxy; empty for the API of the "
        "cluster that the pod runs in, with the pod's service account.",
    )
    kubernetes_namespace: str = setting(
        "", "Namespace of the objects below; empty for the namespace of the pod."
    )
    kubernetes_lease: str = setting(
        "",
        "Lease whose holder leads: repairs, rebuilds, sweeps and sizes the nodes. Empty: the "
        "catalog elects.",
    )
    kubernetes_node_service: str = setting(
        "",
        "Service of the retrieval nodes, whose EndpointSlices tell zones and pods that are gone "
        "before heartbeats do. Empty: heartbeats alone.",
    )
    kubernetes_node_set: str = setting(
        "",
        "StatefulSet of the retrieval nodes, which the leader sizes by the memory in use. Empty: "
        "its size is yours.",
    )
    scale_nodes_min: int = setting(1, "Fewest retrieval nodes.")
    scale_nodes_max: int = setting(1, "Most retrieval nodes.")
    scale_out_above: float = setting(
        0.85, "Nodes are added when they use more than this share of their memory."
    )
    scale_in_below: float = setting(
        0.5, "A node is removed when the others would use less than this share of their memory."
    )
    scale_in_after_s: float = setting(
        1800.0, "How long memory must have been plentiful before a node is removed."
    )

    def check_kubernetes(self) -> None:
        """Raises InvalidRequest where settings contradict each other."""
        if not 1 <= self.scale_nodes_min <= self.scale_nodes_max:
            raise InvalidRequest(
                f"scale_nodes_min is {self.scale_nodes_min} and scale_nodes_max "
                f"{self.scale_nodes_max}; write 1 <= min <= max"
            )
        if not 0 < self.scale_in_below < self.scale_out_above <= 1:
            raise InvalidRequest(
                f"scale_in_below is {self.scale_in_below} and scale_out_above "
                f"{self.scale_out_above}; write 0 < below < above <= 1, apart enough that a node "
                "added is not removed again"
            )

    @property
    def uses_kubernetes(self) -> bool:
        """Whether any part is on."""
        return any((self.kubernetes_lease, self.kubernetes_node_service, self.kubernetes_node_set))
