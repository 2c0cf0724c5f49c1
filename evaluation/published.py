"""Figures the papers print, to stand beside ours. They are quoted, never computed with."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PublishedTable:
    """Scores by method, 0 to 100.

    ours: which of our methods a row stands beside, as a pattern of its name; "" for none. suite and
    length_tokens: which of our pooled rows are shown (0: the longest).
    """

    title: str
    source: str
    rows: tuple[tuple[str, float, str], ...]
    suite: str
    length_tokens: int = 0

    def beside(self, ours: str, method: str) -> bool:
        """Whether our `method` is what a row with the pattern `ours` names."""
        return bool(ours) and re.fullmatch(ours, method) is not None


_FULL = "full"
_RETRIEVAL = r"(cluster|local)/roargraph:top_k=100"
_EXACT_KNN = r"(cluster|local)/flat:top_k=100"
_IVF = r"(cluster|local)/ivf:top_k=100"
_QUEST = r"local/quest\b.*"
_INFLLM = r"local/infllm\b.*"
_STREAMING = r"local/streaming_llm\b.*"
_BETA = r"(cluster:|(cluster|local)/\w+:)beta=.*"

TABLES = (
    PublishedTable(
        "InfiniteBench, average of ten tasks, Llama-3-8B-262K, decode with 100 keys a head",
        "RetrievalAttention, arXiv 2409.10516",
        (
            ("full attention", 50.4, _FULL),
            ("RetrievalAttention", 48.9, _RETRIEVAL),
            ("exact KNN (flat)", 48.9, _EXACT_KNN),
            ("IVF", 48.2, _IVF),
            ("Quest", 47.6, _QUEST),
            ("InfLLM", 45.8, _INFLLM),
        ),
        "infinitebench",
    ),
    PublishedTable(
        "RULER at 128K, Llama-3-8B-262K, decode with 100 keys a head",
        "RetrievalAttention, arXiv 2409.10516",
        (
            ("full attention", 78.7, _FULL),
            ("RetrievalAttention", 74.7, _RETRIEVAL),
            ("exact KNN (flat)", 74.3, _EXACT_KNN),
            ("IVF", 68.2, _IVF),
            ("Quest", 60.5, _QUEST),
            ("InfLLM", 25.7, _INFLLM),
        ),
        "ruler",
        131_072,
    ),
    PublishedTable(
        "RULER, average over 4K to 128K, Llama-3-8B-262K, sparse prefill",
        "MInference 1.0, arXiv 2407.02490",
        (
            ("full attention", 84.4, _FULL),
            ("MInference", 87.0, r"local/full@minference\b.*"),
            ("InfLLM", 62.9, _INFLLM),
            ("StreamingLLM", 35.0, _STREAMING),
        ),
        "ruler",
    ),
    PublishedTable(
        "InfiniteBench, Llama-3-8B: range rule (keep z >= z_max - beta) against a fixed top-k",
        "AlayaDB",
        (
            ("full attention", 45.6, _FULL),
            ("fixed top-k", 45.3, _EXACT_KNN),
            ("range rule", 47.0, _BETA),
        ),
        "infinitebench",
    ),
)

DIFFERENCES = (
    "**Model.** The papers evaluate models of 8 billion weights; ours is the demo model of this "
    "repository, three layers trained to retrieve and nothing else. Its attention is sharp: an "
    "answer hangs on a few keys, so a budget of 100 keys costs it little where it costs an 8B "
    "model up to four points (there exact search loses as much as an index: the loss is the "
    "budget's). Compare each method with full attention in the same column, not across columns.",
    "**Tasks.** The published averages include tasks that need a language model (question "
    "answering, summaries, code, arithmetic). Here are the synthetic ones, and a mixed haystack "
    "that asks many questions over one text. The essay haystack is Python's documentation instead "
    "of Paul Graham's essays.",
    "**Questions come after the prefill.** A context is stored before anyone asks, so methods that "
    "choose keys from the end of the prompt (SnapKV, static selection) see the end of the "
    "haystack, not the question. Where a paper gives them the question, they score higher.",
    "**n.** Ours is printed with every figure, and differences are paired with intervals; most "
    "published tables have neither.",
)
