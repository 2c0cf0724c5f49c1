"""What `--methods` names.

    full                     full attention in this process
    cluster:BUDGET           a cluster with its default index: cluster:top_k=100, cluster:exact
    cluster/INDEX:BUDGET     a cluster whose nodes build INDEX: cluster/hnsw:mass=0.98[64,4096]
    local/DECODE             in this process, a published method or an index with its parameters:
                             local/streaming_llm:sink=128,window=512, local/sketch:top_k=100
    local/DECODE@PREFILL     the same over a sparse prefill: local/full@vertical_slash,
                             local/flat:exact@a_shape:sink_tokens=1024,window_tokens=4096

Questions are put to stored contexts: they attend by the method too, and methods that choose keys
once choose before the question is known. With the parameter prompt=whole, as in
local/snapkv:capacity=1024,prompt=whole, the question is part of the prompt as in the papers: it
attends everything, and such methods choose by it.

Methods that differ only in budget share one cluster and one prefill of each context; methods in
this process share a prefill with all others of the same prefill method.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from evaluation.answering import AnyAnswerer, ClusterAnswerer
from evaluation.local import (
    DENSE,
    Contexts,
    FullAnswerer,
    LocalAnswerer,
    LocalMethod,
    parse_local,
)
from gpu_worker.model import load_model
from library.decode import decode_names
from longreach.errors import InvalidRequest
from longreach.local_cluster import LocalCluster
from longreach.sdk import Client
from longreach.types import Budget
from retrieval_node.index.base import INDEX_KINDS

FULL = "full"


@dataclass(frozen=True, slots=True)
class Method:
    """A method as named on the command line.

    index, budget: of a cluster; index "" for its own choice. local: of a method in this process.
    """

    name: str
    index: str = ""
    budget: str = ""
    local: LocalMethod | None = None

    @property
    def is_full(self) -> bool:
        """Whether this is full attention."""
        return self.name == FULL

    @property
    def configuration(self) -> str:
        """The method with every parameter, as far as its name decides them."""
        return str(self.local) if self.local else self.name

    @property
    def runs_here(self) -> bool:
        """Whether it needs no cluster."""
        return self.is_full or self.local is not None

    @property
    def prefill(self) -> str:
        """The prefill method of a method that runs here."""
        return self.local.prefill if self.local else DENSE


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
    # A comma inside the brackets of a mass budget separates nothing, nor one before a parameter.
    separator = r",(?![^\[]*\])(?!\s*\w+=)"
    names = [name.strip() for text in texts for name in re.split(separator, text)]
    return [_parse(name) for name in dict.fromkeys(names) if name]


def _parse(name: str) -> Method:
    if name == FULL:
        return Method(name)
    if name.startswith("local/"):
        try:
            return Method(name, local=parse_local(name.removeprefix("local/")))
        except InvalidRequest as error:
            raise InvalidRequest(f"method {name!r}: {error}", reason=error.reason) from None
    match = re.fullmatch(r"cluster(?:/(\w+))?:(.+)", name)
    if match is None:
        raise InvalidRequest(
            f"unknown method {name!r}; write full, cluster:BUDGET, cluster/INDEX:BUDGET, for "
            "example cluster:top_k=100, or local/DECODE[@PREFILL] with DECODE one of "
            f"{', '.join(decode_names())}",
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
        key = method.prefill if method.runs_here else method.index
        groups.setdefault((method.runs_here, key), []).append(method)
    return list(groups.values())


@contextmanager
def open_answerers(
    group: Sequence[Method], deployment: Deployment
) -> Iterator[dict[Method, AnyAnswerer]]:
    """Answerers of one group; a cluster that has to be started lives as long as the context.

    Raises InvalidRequest when a running cluster cannot serve the group.
    """
    if group[0].runs_here:
        yield _local_answerers(group, deployment.model)
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


def _local_answerers(group: Sequence[Method], model: str) -> dict[Method, AnyAnswerer]:
    needs_queries = any(m.local and m.local.decode.needs_every_query for m in group)
    contexts = Contexts(load_model(model), group[0].prefill, every_query=needs_queries)
    return {
        m: LocalAnswerer(contexts, m.local.decode, m.local.prompt)
        if m.local
        else FullAnswerer(contexts)
        for m in group
    }


def _local_cluster(index: str, deployment: Deployment, directory: Path) -> LocalCluster:
    return LocalCluster(
        deployment.model,
        nodes=deployment.nodes,
        data_dir=directory,
        node_flags={"index_kind": index} if index else {},
        worker_flags={
            "sink_tokens": deployment.sink_tokens,
            "window_tokens": deployment.window_tokens,
            "prefill_pattern": DENSE,
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
