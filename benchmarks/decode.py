"""Decode time per token against context length, KV loaded directly, without a prefill.

Rows: SDPA with a static cache and the eager model (the whole KV on the device, transformers
unchanged), and the worker with its resident window over one real retrieval node for each index
kind, over gRPC on loopback. All run the same random Llama and the same KV; methods take turns, a
few tokens each, and medians are reported. KV is random with a planted structure (see `random_kv`):
it shows time, not accuracy.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

from benchmarks.report import Report, argument_parser
from gpu_worker.config import WorkerConfig
from gpu_worker.engine import Engine
from gpu_worker.model import prepare_model
from longreach.local_cluster import MemberProcess
from longreach.rpc.retrieval import NodeClient
from longreach.security import Capability, sign
from longreach.steps import StepRow
from longreach.types import (
    BFLOAT16,
    Budget,
    KvBlock,
    SessionRecord,
    Shard,
    ShardMap,
    Span,
    StorageArray,
)

LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM = 4, 8, 2, 128
BUDGET = Budget.parse("top_k=100")
TURN_TOKENS = 4
PUT_TOKENS = 8192


def random_llama() -> LlamaForCausalLM:
    """A small random Llama in bfloat16 with heads of 128."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1024, num_hidden_layers=LAYERS,
        num_attention_heads=Q_HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
        max_position_embeddings=1 << 20,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def random_kv(tokens: int) -> tuple[StorageArray, StorageArray]:
    """Keys and values [layers, kv_heads, tokens, head_dim] with a decaying spectrum."""
    rng = np.random.default_rng(tokens)
    shape = (LAYERS, KV_HEADS, tokens, HEAD_DIM)
    spectrum = np.exp(-np.arange(HEAD_DIM) / 24).astype(np.float32) * 2
    keys = rng.standard_normal(shape, np.float32) * spectrum
    return keys.astype(BFLOAT16), rng.standard_normal(shape, np.float32).astype(BFLOAT16)


class TransformersMethod:
    """The model unchanged, the whole KV in its cache."""

    def __init__(self, name: str, keys: StorageArray, values: StorageArray, steps: int) -> None:
        self.name = name
        self._tokens = keys.shape[2]
        implementation = "eager" if name == "eager" else "sdpa"
        self._model = random_llama()
        self._model.set_attn_implementation(implementation)
        config = self._model.config
        if name == "sdpa_static":
            self._cache = StaticCache(config=config, max_cache_len=self._tokens + steps + 8)
        else:
            self._cache = DynamicCache(config=config)
        k, v = (torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) for x in (keys, values))
        for layer in range(LAYERS):
            self._cache.update(k[layer][None], v[layer][None], layer)

    def token(self) -> None:
        """One decode step."""
        with torch.inference_mode():
            self._model(
                input_ids=torch.tensor([[7]]),
                position_ids=torch.tensor([[self._tokens]]),
                past_key_values=self._cache,
            )
        self._tokens += 1

    def resident_bytes(self) -> int:
        """Bytes of KV on the device."""
        return int(self._tokens) * LAYERS * KV_HEADS * HEAD_DIM * 2 * 2


class RetrievalMethod:
    """The worker's engine in this process over one retrieval node in its own."""

    def __init__(self, kind: str, keys: StorageArray, values: StorageArray, folder: Path) -> None:
        self.name = f"retrieval_{kind}"
        self._secret = secrets.token_hex(16)
        self._node = MemberProcess(
            self.name, "retrieval_node",
            {"--node-id": "node-0", "--index-kind": kind, "--exit-with-parent": "true"},
            folder / f"{self.name}-{keys.shape[2]}.log",
            {**os.environ, "LONGREACH_CLUSTER_SECRET": self._secret},
        )  # fmt: skip
        self._node.start()
        self._node.wait_announced(time.monotonic() + 60)
        self._model = prepare_model(random_llama(), "random-llama", torch.device("cpu"))
        # The KV is made up, not prefilled; its identity is that of a dense prefill.
        config = WorkerConfig(model="random-llama", max_sessions=1, prefill_pattern="dense")
        self._engine = Engine(self._model, config)
        self._engine.start()
        self.index_ready_s = self._load(keys, values)
        self._tokens = keys.shape[2]
        self._resident = self._open()

    def _capability(self, action: str, **session: object) -> bytes:
        expires = time.time() + 3600
        return sign(
            Capability(action, "", "ctx-bench", expires, **session),  # type: ignore[arg-type]
            self._secret.encode(),
        )

    def _load(self, keys: StorageArray, values: StorageArray) -> float:
        """Puts and seals the KV; returns seconds from the seal until the index answers."""
        tokens = keys.shape[2]
        layers = tuple(range(LAYERS))
        self._shard = Shard("all", Span(0, tokens), layers, 0, KV_HEADS, ("node-0",))
        write = self._capability("write")
        blocks = (
            KvBlock((layer,), 0, start, k[None], v[None])
            for layer, start in itertools.product(layers, range(0, tokens, PUT_TOKENS))
            for k, v in [(x[layer, :, start : start + PUT_TOKENS] for x in (keys, values))]
        )
        with contextlib.closing(NodeClient(self._node.address)) as client:
            client.put(
                "ctx-bench", self._shard, self._model.info.identity, self._model.layers, write,
                blocks,
            )  # fmt: skip
            client.seal("ctx-bench", "all", write, [7] * tokens)
            sealed = time.perf_counter()
            while True:
                status = client.inventory("ctx-bench")[0][0].index
                if status.error:
                    raise RuntimeError(f"{self.name}: the index was not built: {status.error}")
                if status.built == status.total:
                    return time.perf_counter() - sealed
                time.sleep(0.05)

    def _open(self) -> int:
        record = SessionRecord("bench", "ctx-bench", self._tokens, "", 1)
        placement = ShardMap((self._shard,), {"node-0": self._node.address}, "layer")
        capability = self._capability("read", session_id="bench", epoch=1)
        _, resident = self._engine.open_session(
            record, self._model.info.identity, placement, capability, BUDGET, 1.0
        )
        return resident

    def token(self) -> None:
        """One decode step."""
        (result,) = self._engine.step([StepRow("bench", self._tokens, (7,), True)]).results
        if result.error is not None:
            raise result.error
        self._tokens += 1
        self.work = result.work

    def resident_bytes(self) -> int:
        """Bytes of KV on the device."""
        return self._resident

    def close(self) -> None:
        """Stops the engine and the node."""
        self._engine.stop()
        self._node.stop()


def take_turns(methods: dict[str, Callable[[], None]], turns: int) -> dict[str, list[float]]:
    """Seconds of every token after a warm-up, methods in turn."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(turns + 1):
        for name, token in methods.items():
            for _ in range(TURN_TOKENS):
                began = time.perf_counter()
                token()
                if turn:
                    times[name].append(time.perf_counter() - began)
    return times


@contextlib.contextmanager
def retrieval(
    kinds: list[str], keys: StorageArray, values: StorageArray
) -> Iterator[list[RetrievalMethod]]:
    """One node for each index kind, stopped at the end."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield [
            stack.enter_context(contextlib.closing(RetrievalMethod(kind, keys, values, folder)))
            for kind in kinds
        ]


def measure(
    report: Report, tokens: int, kinds: list[str], turns: int, baselines: list[str]
) -> None:
    """Every method at one context length."""
    keys, values = random_kv(tokens)
    steps = (turns + 1) * TURN_TOKENS
    plain = [TransformersMethod(name, keys, values, steps) for name in baselines]
    with retrieval(kinds, keys, values) as remote:
        methods: list[TransformersMethod | RetrievalMethod] = [*plain, *remote]
        times = take_turns({each.name: each.token for each in methods}, turns)
        reference = statistics.median(times[plain[0].name])
        for each in methods:
            row: dict[str, object] = {
                "context_tokens": tokens,
                "method": each.name,
                "token_ms": statistics.median(times[each.name]) * 1e3,
                "vs_" + plain[0].name: reference / statistics.median(times[each.name]),
                "resident_kv_bytes": each.resident_bytes(),
            }
            if isinstance(each, RetrievalMethod):
                row |= {
                    "index_ready_s": each.index_ready_s,
                    "scan_fraction": each.work.scan_fraction,
                    "sketch_fraction": each.work.sketch_fraction,
                    "attended_fraction": each.work.attended_fraction,
                    "bytes_fraction": each.work.bytes_fraction,
                }
            report.add(**row)


def main() -> None:
    """Command line."""
    parser = argument_parser("decode", __doc__ or "")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072]
    )
    parser.add_argument("--kinds", nargs="+", default=["flat", "hnsw", "sketch"])
    parser.add_argument("--turns", type=int, default=8, help="turns of four tokens per method")
    arguments = parser.parse_args()
    lengths, kinds = arguments.lengths, arguments.kinds
    report = Report(
        "decode",
        {"layers": LAYERS, "q_heads": Q_HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM,
         "dtype": "bfloat16", "budget": str(BUDGET), "nodes": 1, "batch": 1,
         "threads": torch.get_num_threads()},
        quick=arguments.quick,
    )  # fmt: skip
    if arguments.quick:
        lengths, kinds = [4096, 32768], [kind for kind in kinds if kind != "hnsw"]
        report.skip("hnsw", "its build takes longer than a quick run")
        report.skip("lengths other than 4096 and 32768", "quick")
    for tokens in lengths:
        measure(report, tokens, kinds, 3 if arguments.quick else arguments.turns,
                ["sdpa_static", "eager"])  # fmt: skip
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
