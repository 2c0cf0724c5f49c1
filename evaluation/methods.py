"""What `--methods` names.

    full                     full attention in this process
    cluster:BUDGET           a cluster with its default index: cluster:top_k=100, cluster:exact
    cluster/INDEX:BUDGET     a cluster whose nodes build INDEX: cluster/hnsw:mass=0.98[64,4096]

Methods that differ only in budget share one cluster and one prefill of each context.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from evaluation.answering import AnyAnswerer, ClusterAnswerer, FullAnswerer
from longreach.errors import InvalidRequest
from longreach.local_cluster import LocalCluster
from longreach.sdk import Client
from longreach.types import Budget
from retrieval_node.index.base import INDEX_KINDS

FULL = "full"


@dataclass(frozen=True, slots=True)
class Method:
    """A method as named on the command line. `index`: "" for the cluster's own choice."""

    name: str
    index: str = ""
    budget: str = ""

    @property
    def is_full(self) -> bool:
        """Whether this is full attention."""
        return self.name == FULL


@dataclass(frozen=True, slots=True)
class Deployment:
    """Where the methods run.

    model: directory or hub name. address: of a running cluster; "" starts one on this machine with
    `nodes` nodes, and `sink_tokens` and `window_tokens` of each sequence on the worker.
    """

    model: str
    address: str = ""
    nodes: int = 2
    sink_tokens: int = 128
    window_tokens: int = 512


def parse_methods(texts: Sequence[str]) -> list[Method]:
    """Methods of command-line words, each one or several separated by commas.

    Raises InvalidRequest naming what is wrong with one.
    """
    # The comma inside the brackets of a mass budget separates nothing.
    names = [name.strip() for text in texts for name in re.split(r",(?![^\[]*\])", text)]
    return [_parse(name) for name in dict.fromkeys(names) if name]


def _parse(name: str) -> Method:
    if name == FULL:
        return Method(name)
    match = re.fullmatch(r"cluster(?:/(\w+))?:(.+)", name)
    if match is None:
        raise InvalidRequest(
            f"unknown method {name!r}; write full, cluster:BUDGET or cluster/INDEX:BUDGET, "
            "for example cluster:top_k=100",
            reason="UNKNOWN_NAME",
        )
    index = match[1] or ""
    if index:
        INDEX_KINDS[index]
    try:
        budget = str(Budget.parse(match[2]))
    except ValueError as error:
        raise InvalidRequest(f"method {name!r}: {error}") from None
    return Method(name, index, budget)


def group_methods(methods: Sequence[Method]) -> list[list[Method]]:
    """Methods that can share a prefill, in the order given."""
    groups: dict[tuple[bool, str], list[Method]] = {}
    for method in methods:
        groups.setdefault((method.is_full, method.index), []).append(method)
    return list(groups.values())


@contextmanager
def open_answerers(
    group: Sequence[Method], deployment: Deployment
) -> Iterator[dict[Method, AnyAnswerer]]:
    """Answerers of one group; a cluster that has to be started lives as long as the context.

    Raises InvalidRequest when a running cluster cannot serve the group.
    """
    if group[0].is_full:
        full = FullAnswerer.load(deployment.model)
        yield dict.fromkeys(group, full)
    elif deployment.address:
        with Client(deployment.address) as client:
            served = _served_model(client, group[0], deployment)
            yield {m: ClusterAnswerer(client, m.budget, served) for m in group}
    else:
        with (
            tempfile.TemporaryDirectory(prefix="longreach-evaluation-") as directory,
            _local_cluster(group[0].index, deployment, Path(directory)) as cluster,
            Client(cluster.address) as client,
        ):
            yield {method: ClusterAnswerer(client, method.budget) for method in group}


def _local_cluster(index: str, deployment: Deployment, directory: Path) -> LocalCluster:
    return LocalCluster(
        deployment.model,
        nodes=deployment.nodes,
        data_dir=directory,
        node_flags={"index_kind": index} if index else {},
        worker_flags={
            "sink_tokens": deployment.sink_tokens,
            "window_tokens": deployment.window_tokens,
        },
    )


def _served_model(client: Client, method: Method, deployment: Deployment) -> str:
    if method.index:
        raise InvalidRequest(
            f"method {method.name!r} asks for an index kind, which the nodes of a running cluster "
            "choose by --index-kind; leave out --address, or write cluster:BUDGET"
        )
    name, served = Path(deployment.model).name, client.status().models
    if name not in served:
        raise InvalidRequest(
            f"the cluster at {deployment.address} serves {', '.join(served) or 'no model'}, not "
            f"{name!r}: methods are compared on one model"
        )
    return name
