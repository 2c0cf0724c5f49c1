"""Answers under full attention: every key of every layer, no window, no nodes, no retrieval.

    python -m gpu_worker.reference --model models/demo --document book.txt --question "Who ...?"
    python -m gpu_worker.reference --model models/demo --tokens prompt.json

The document is prefilled once in chunks and each question is answered greedily after it. `--tokens`
names a JSON file {"context": [ids], "questions": [[ids], ...]} instead of texts. Prints one JSON
object {"tokens": [[ids], ...], "answers": [texts]}; the answers are there when texts were given.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.cache_utils import Cache, CacheLayerMixin

from gpu_worker.arrays import to_tensor
from gpu_worker.attention import LayerCall, Partial, apply_sinks, causal_attention, mark
from gpu_worker.chunking import FixedChunks
from gpu_worker.decoding import check_tokens
from gpu_worker.model import Model, load_model
from gpu_worker.prefill import PrefillJob
from longreach.errors import InvalidRequest, LongreachError
from longreach.logging import configure
from longreach.types import IntArray, StorageArray

log = logging.getLogger(__name__)

CHUNK_TOKENS = 2048


class FullAttention:
    """A context with its whole KV on the device, to be asked any number of questions.

    `room_tokens` bounds a question and its answer together.
    """

    def __init__(self, model: Model, context: Sequence[int], room_tokens: int = 1024) -> None:
        self._model = model
        self._context = len(context)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        capacity = self._context + room_tokens
        for layer in model.layers:
            shape = (layer.kv_heads, capacity)
            options: Any = {"dtype": model.dtype, "device": model.device}
            self.keys.append(torch.zeros(*shape, layer.head_dim, **options))
            self.values.append(torch.zeros(*shape, layer.value_dim, **options))
        self.length = 0
        if context:
            job = PrefillJob(context, model.layers, self, FixedChunks(CHUNK_TOKENS))
            job.run(model.module, model.device)
            self.length = self._context

    def put(self, layer: int, start: int, keys: StorageArray, values: StorageArray) -> None:
        """Takes a chunk of the prefill."""
        span = slice(start, start + keys.shape[1])
        self.keys[layer][:, span] = to_tensor(keys, self._model.device)
        self.values[layer][:, span] = to_tensor(values, self._model.device)

    def put_queries(self, layer: int, positions: IntArray, queries: StorageArray) -> None:
        """Nothing is indexed."""

    def answer(
        self, question: Sequence[int], max_tokens: int, stop_ids: Sequence[int] = ()
    ) -> list[int]:
        """Greedy tokens after context and question, without the token that ended them."""
        self.length = self._context
        pending = list(question)
        tokens: list[int] = []
        while len(tokens) < max_tokens:
            token = int(self.feed(pending).argmax())
            if token in stop_ids:
                break
            tokens.append(token)
            pending = [token]
        return tokens

    def feed(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits [vocab] after the tokens, which stay part of the sequence."""
        device = self._model.device
        stop = self.length + len(tokens)
        if stop > self.keys[0].shape[1]:
            raise InvalidRequest(
                f"question and answer need {stop - self._context} tokens; there is room for "
                f"{self.keys[0].shape[1] - self._context}"
            )
        layers = [_FullLayer(self, layer) for layer in range(len(self.keys))]
        logits = self._model.forward(
            input_ids=torch.tensor([list(tokens)], device=device),
            position_ids=torch.arange(self.length, stop, device=device)[None],
            past_key_values=Cache(layers=layers),
            logits_to_keep=1,
        )
        self.length = stop
        return logits[-1]


class _FullLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a FullAttention as transformers sees it."""

    is_sliding = False

    def __init__(self, owner: FullAttention, layer: int) -> None:
        super().__init__()
        self._owner = owner
        self._layer = layer
        self._stop = owner.length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores keys and values [1, kv_heads, n, d] behind those held."""
        self._stop = self._owner.length + key_states.shape[2]
        span = slice(self._owner.length, self._stop)
        self._owner.keys[self._layer][:, span] = key_states[0]
        self._owner.values[self._layer][:, span] = value_states[0]
        return mark(key_states, self), value_states

    def attend(self, queries: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Causal attention of queries [q_heads, n, d] over everything held."""
        part = causal_attention(
            queries,
            self._owner.keys[self._layer][:, : self._stop],
            self._owner.values[self._layer][:, : self._stop],
            self._owner.length,
            call.scale,
            call.softcap,
            call.sliding_window,
        )
        return apply_sinks(
            Partial(part.output.transpose(0, 1), part.lse.transpose(0, 1)), call.sinks
        )

    def get_seq_length(self) -> int:
        """Unused: positions are explicit."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Unused: no mask is made."""
        return query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


def main(argv: Sequence[str] | None = None) -> int:
    """Answers what the command line asks; returns the exit status."""
    configure()
    try:
        print(json.dumps(_answer(_parse(argv))))
    except LongreachError as error:
        log.error("%s", error.message)
        return 2
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_worker.reference", description="Greedy answers under full attention."
    )
    parser.add_argument("--model", required=True, help="directory or hub name of the model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--document", type=Path, help="text file, UTF-8; with --question")
    source.add_argument("--tokens", type=Path, help="JSON file with token ids")
    parser.add_argument("--question", action="append", default=[], help="may be repeated")
    parser.add_argument("--max-tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--stop", default="", help="text that ends an answer; not part of it")
    return parser.parse_args(argv)


def _answer(arguments: argparse.Namespace) -> dict[str, Any]:
    model = load_model(arguments.model)
    if arguments.tokens is not None:
        asked = json.loads(arguments.tokens.read_text(encoding="utf-8"))
        tokens = _ask(model, asked["context"], asked["questions"], arguments.max_tokens)
        return {"tokens": tokens}
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    context = _without_eos(tokenizer(arguments.document.read_text("utf-8")).input_ids, model)
    questions = [tokenizer(text, add_special_tokens=False).input_ids for text in arguments.question]
    tokens = _ask(model, context, questions, arguments.max_tokens)
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in tokens]
    if arguments.stop:
        texts = [text.split(arguments.stop)[0] for text in texts]
    return {"tokens": tokens, "answers": texts}


def _ask(
    model: Model, context: Sequence[int], questions: Sequence[Sequence[int]], max_tokens: int
) -> list[list[int]]:
    longest = max((len(question) for question in questions), default=0)
    if not questions or not all(questions):
        raise InvalidRequest("ask at least one question of at least one token")
    for ids in (context, *questions):
        check_tokens(ids, model.info.vocab_size)
    if len(context) + longest + max_tokens > model.info.max_positions:
        raise InvalidRequest(
            f"context, question and answer take {len(context) + longest + max_tokens} positions; "
            f"model {model.info.model!r} accepts {model.info.max_positions}"
        )
    full = FullAttention(model, context, longest + max_tokens)
    return [full.answer(question, max_tokens, model.info.eos_ids) for question in questions]


def _without_eos(ids: list[int], model: Model) -> list[int]:
    """The ids without an end-of-sequence token that a tokenizer may add: more text follows."""
    return ids[:-1] if ids and ids[-1] in model.info.eos_ids else ids


if __name__ == "__main__":
    sys.exit(main())
