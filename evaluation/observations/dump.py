"""`dump`: runs a Hugging Face causal language model over a text and keeps keys, values, queries.

The prefill is the worker's own, layer by layer and chunk by chunk through transformers' attention
interface, so that the device holds the weights, the hidden states and one layer's KV.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.report import commit, machine
from evaluation.encoding import Encoder, load_encoder
from evaluation.fingerprint import model_fingerprint
from evaluation.observations.dump_files import DumpedLayer, layer_file, write_header
from evaluation.observations.reporting import progress_bar
from longreach.errors import InvalidRequest
from longreach.types import IntArray, LayerGeometry, StorageArray
from models.prose import prose_text, source_text

if TYPE_CHECKING:
    from gpu_worker.attention import LayerCall

CHUNK_TOKENS = 2048


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("dump", help="keys, values and queries of a model over a text")
    parser.description = __doc__
    parser.add_argument("--model", required=True, help="directory or hub name")
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text; default: documentation and sources of Python's library",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=32_768,
        metavar="N",
        help="tokens of the text, the decode tokens among them (default 32768)",
    )
    parser.add_argument(
        "--decode",
        type=int,
        default=64,
        metavar="D",
        help="last tokens, whose queries stand for decode steps (default 64)",
    )
    parser.add_argument(
        "--queries",
        type=int,
        default=2048,
        metavar="M",
        help="prompt queries kept a head, a quarter of them the last (default 2048)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the dump")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    """Dumps what the command line asks."""
    name, text = long_text(given.text)
    encoder = load_encoder(given.model)
    ids = first_tokens(encoder, text, given.tokens, name)
    dump_model(
        given.model,
        ids,
        given.out,
        decode=given.decode,
        queries=given.queries,
        device=given.device,
        dtype=given.dtype,
        text={"name": name, "sha256": hashlib.sha256(text.encode()).hexdigest()},
    )


def long_text(path: Path | None) -> tuple[str, str]:
    """Name and content of a text: a file's, or about 4 MB that come with every Python.

    The default is the part of Python's documentation and library that the demo model never saw,
    then the part that it was trained on. Raises InvalidRequest for a file that is no UTF-8 text.
    """
    if path is None:
        parts = (prose_text(True), source_text(True), prose_text(False), source_text(False))
        return f"library of CPython {platform.python_version()}", "\n\n".join(parts)
    try:
        return path.name, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read the text {path}: {error}") from error


def first_tokens(encoder: Encoder, text: str, tokens: int, name: str) -> list[int]:
    """The model's start tokens and the text's first, `tokens` in all.

    Raises InvalidRequest when the text is too short.
    """
    wanted = tokens - len(encoder.start_ids)
    characters = 8 * tokens
    ids = encoder.encode(text[:characters])
    while len(ids) < wanted and characters < len(text):
        characters *= 2
        ids = encoder.encode(text[:characters])
    if len(ids) < wanted:
        raise InvalidRequest(
            f"{name} has {len(ids)} tokens and {tokens} were asked for; give a longer text or "
            "fewer --tokens"
        )
    return [*encoder.start_ids, *ids[:wanted]]


def dump_model(
    source: str,
    ids: list[int],
    directory: Path,
    *,
    decode: int = 64,
    queries: int = 2048,
    device: str = "auto",
    dtype: str = "auto",
    text: dict[str, str] | None = None,
) -> None:
    """Runs a model over token ids and writes the dump.

    Raises InvalidRequest for a sequence that the model cannot take, UnsupportedModel for a model
    whose keys and queries the attention interface does not see as they are attended.
    """
    from gpu_worker.chunking import FixedChunks, sample_positions
    from gpu_worker.model import load_model
    from gpu_worker.prefill import PrefillJob

    context = len(ids) - decode
    if decode < 1 or context < 1:
        raise InvalidRequest(f"{decode} decode tokens of {len(ids)}; leave at least one of each")
    model = load_model(source, device, dtype)
    if len(ids) > model.info.max_positions:
        raise InvalidRequest(
            f"{len(ids)} tokens; {source} accepts {model.info.max_positions}: ask for fewer"
        )
    directory.mkdir(parents=True, exist_ok=True)
    kept = np.append(sample_positions(context, queries), np.arange(context, len(ids)))
    with progress_bar() as progress:
        task = progress.add_task(f"running {model.info.model}", total=len(model.layers) * len(ids))

        def point(layer: int, tokens_done: int) -> bool:
            progress.update(task, completed=layer * len(ids) + tokens_done)
            return False

        sink = LayerFiles(directory, model.layers, len(ids), decode)
        chunks = FixedChunks(CHUNK_TOKENS)
        job = PrefillJob(ids, model.layers, sink, chunks, point, query_positions=kept)
        job.run(model.module, model.device)
        progress.update(task, completed=len(model.layers) * len(ids))
    header = {
        "model": model_fingerprint(source),
        "tokens": len(ids),
        "decode_tokens": decode,
        "text": text,
        "token_digest": hashlib.sha256(np.array(ids, "<i8").tobytes()).hexdigest(),
        "dtype": model.info.identity.dtype,
        "rope": model.info.identity.rope_regime,
        "layers": [
            dataclasses.asdict(dumped_layer(layer, job.calls[layer.layer]))
            for layer in model.layers
            if not layer.sliding_window
        ],
        "left_out": "layers with a sliding window, which are never searched",
        "machine": machine(),
        "commit": commit(),
    }
    write_header(directory, header)


def dumped_layer(layer: LayerGeometry, call: LayerCall) -> DumpedLayer:
    """What the header says of a layer, from what the layer asked of its attention."""
    return DumpedLayer(
        layer.layer,
        layer_file(layer.layer),
        layer.q_heads,
        layer.kv_heads,
        call.scale,
        call.softcap,
        call.sinks is not None,
    )


class LayerFiles:
    """The sink of a dump's prefill: collects one layer at a time and writes its file."""

    def __init__(
        self, directory: Path, layers: tuple[LayerGeometry, ...], tokens: int, decode: int
    ) -> None:
        self._directory = directory
        self._layers = layers
        self._tokens = tokens
        self._decode = decode
        self._keys: StorageArray
        self._values: StorageArray

    def put(self, layer: int, start: int, keys: StorageArray, values: StorageArray) -> None:
        """Takes a chunk's keys and values; those of sliding-window layers are dropped."""
        if self._layers[layer].sliding_window:
            return
        if start == 0:
            self._keys = _room(keys, self._tokens)
            self._values = _room(values, self._tokens)
        span = slice(start, start + keys.shape[1])
        self._keys[:, span] = keys
        self._values[:, span] = values

    def put_queries(self, layer: int, positions: IntArray, queries: StorageArray) -> None:
        """Takes the layer's kept queries, after its last keys, and writes the file."""
        from safetensors.torch import save_file

        from gpu_worker.arrays import to_tensor

        arrays: dict[str, StorageArray] = {
            "keys": self._keys,
            "values": self._values,
            "queries": queries[:, : -self._decode],
            "positions": positions[: -self._decode],
            "decode_queries": queries[:, -self._decode :],
        }
        save_file(
            {name: to_tensor(array) for name, array in arrays.items()},
            self._directory / layer_file(layer),
        )


def _room(chunk: StorageArray, tokens: int) -> StorageArray:
    """An empty array for a layer of `tokens` tokens, of a chunk's heads, width and dtype."""
    return np.empty((chunk.shape[0], tokens, chunk.shape[2]), chunk.dtype)
