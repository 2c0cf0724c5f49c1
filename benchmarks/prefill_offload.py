"""What storing the KV costs a prefill: the ingest of a document with its node, and with none.

The same ingest runs in turns against a real node process over loopback gRPC, until its KV is sealed
and can be asked, and against a stand-in that takes every part and keeps nothing. The worker
computes on one thread, so that the node, which would have a machine of its own, finds a free core.
What the node builds later, in the background, is not waited for: a shard answers, by exact search,
from the moment it is sealed.
"""

from __future__ import annotations

import collections
import os
import secrets
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from benchmarks.report import Report, argument_parser
from benchmarks.rpc import python_process, read_line
from gpu_worker.chunking import FixedChunks
from gpu_worker.ingest import Ingest, IngestNode
from gpu_worker.model import Model, load_model
from gpu_worker.offload import Destination, Part
from gpu_worker.patterns.spec import pattern_for_model
from gpu_worker.scheduler import DeviceThread
from longreach.quickstart.document import build_document
from longreach.rpc.retrieval import NodeClient
from longreach.security import Capability, sign
from longreach.types import Identity, KvBlock, LayerGeometry, Shard, ShardMap, ShardPart, Span

_CHUNK_TOKENS = 2048
_MOST_OVERHEAD_PERCENT = 5.0


class NoNode:
    """Takes KV as fast as it comes and keeps none."""

    def __init__(self, address: str) -> None:
        self.address = address

    def put(
        self,
        context_id: str,
        shard: Shard,
        identity: Identity,
        geometry: Sequence[LayerGeometry],
        capability: bytes,
        parts: Iterator[Part],
    ) -> int:
        """Reads every part; returns their bytes."""
        return sum(
            part.keys.nbytes + part.values.nbytes for part in parts if isinstance(part, KvBlock)
        )

    def seal(
        self, context_id: str, shard_id: str, capability: bytes, token_ids: Sequence[int]
    ) -> tuple[int, int]:
        """Nothing is stored."""
        return 0, 0

    def drop(self, context_id: str, capability: bytes) -> int:
        """Nothing is stored."""
        return 0

    def drop_shards(self, context_id: str, shard_ids: Sequence[str], capability: bytes) -> int:
        """Nothing is stored."""
        return 0

    def read_shard(
        self, context_id: str, shard_id: str, capability: bytes, layer: int, start: int
    ) -> Iterator[ShardPart]:
        """Nothing is stored."""
        return iter(())

    def close(self) -> None:
        """There is no connection."""


def destination(model: Model, tokens: int, address: str, secret: str) -> Destination:
    """A new context, whole on one node."""
    context_id = f"ctx-{secrets.token_hex(16)}"
    layers = tuple(layer.layer for layer in model.layers)
    shard = Shard("all", Span(0, tokens), layers, 0, model.layers[0].kv_heads, ("node",))
    capability = Capability("write", "", context_id, time.time() + 3600)
    return Destination(
        context_id,
        model.info.identity,
        ShardMap((shard,), {"node": address}, "benchmark"),
        sign(capability, secret.encode()),
    )


def ingest_seconds(
    model: Model,
    device: DeviceThread,
    to: Destination,
    token_ids: Sequence[int],
    pattern: str,
    connect: Callable[[str], IngestNode],
) -> float:
    """Seconds until the context is sealed."""
    ingest = Ingest(
        model,
        device,
        to,
        token_ids,
        FixedChunks(_CHUNK_TOKENS),
        threading.Event(),
        pattern_for_model(pattern, model.info),
        connect,
    )
    last = collections.deque(ingest.run(), maxlen=1).pop()
    if last.summary is None:
        raise RuntimeError("the ingest ended without a summary")
    return last.summary.total_s


def main() -> None:
    """Command line."""
    parser = argument_parser("prefill_offload", __doc__ or "")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="models/demo")
    parser.add_argument("--prefill", default="adaptive")
    arguments = parser.parse_args()
    tokens = 8_192 if arguments.quick else arguments.tokens
    rounds = 3 if arguments.quick else arguments.rounds
    secret = os.environ["LONGREACH_CLUSTER_SECRET"] = secrets.token_hex(16)
    torch.set_num_threads(1)
    model = load_model(arguments.model, device="cpu", dtype="bfloat16")
    tokenizer = Path(arguments.model, "tokenizer.json")
    token_ids = (
        Tokenizer.from_file(str(tokenizer)).encode(build_document(tokenizer, tokens).text).ids
    )
    device = DeviceThread()
    device.start()
    connections: dict[str, Callable[[str], IngestNode]] = {"with": NodeClient, "without": NoNode}
    seconds: dict[str, list[float]] = {name: [] for name in connections}
    with python_process("retrieval_node", experiments="") as node:
        address = read_line(node).split()[1]
        for turn in range(rounds + 1):
            for name, connect in connections.items():
                to = destination(model, len(token_ids), address, secret)
                took = ingest_seconds(model, device, to, token_ids, arguments.prefill, connect)
                if turn:  # the first warms up
                    seconds[name].append(took)
                client = connect(address)
                client.drop(to.context_id, to.capability)
                client.close()
    device.stop()
    report = Report(
        "prefill_offload",
        {"tokens": len(token_ids), "model": arguments.model, "prefill": arguments.prefill,
         "rounds": rounds, "chunk_tokens": _CHUNK_TOKENS, "worker_threads": 1},
        quick=arguments.quick,
    )  # fmt: skip
    for name, taken in seconds.items():
        report.add(node=name, median_s=statistics.median(taken), fastest_s=min(taken),
                   slowest_s=max(taken))  # fmt: skip
    pairs = zip(seconds["with"], seconds["without"], strict=True)
    report.at_most(
        "a prefill with its KV stored, over one without",
        _MOST_OVERHEAD_PERCENT,
        100 * (statistics.median(stored / alone for stored, alone in pairs) - 1),
        "% more time",
        "median of pairs that ran in turn",
    )
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
