"""What the tour measured: as a table for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from longreach.cli.ask import work_as_json
from longreach.sdk import Context, Generation, Work
from longreach.types import total_work


@dataclass(frozen=True, slots=True)
class Answer:
    """One question with what came back. `ttft_s` is from sending it to the first token's arrival.

    `full_attention_answer` is None unless it was asked for.
    """

    question: str
    expected: str
    generation: Generation
    ttft_s: float
    full_attention_answer: str | None = None

    @property
    def answer(self) -> str:
        """The generated text without the space that begins it."""
        return self.generation.text.strip()

    @property
    def right(self) -> bool:
        """Whether it is the hidden fact and, where that was asked for, full attention's answer."""
        agrees = self.full_attention_answer in (None, self.answer)
        return self.answer == self.expected and agrees

    def as_json(self) -> dict[str, Any]:
        """The answer with its own figures; `full_attention_answer` only where there is one."""
        generation = self.generation
        told: dict[str, Any] = {
            "question": self.question,
            "answer": self.answer,
            "expected": self.expected,
        }
        if self.full_attention_answer is not None:
            told["full_attention_answer"] = self.full_attention_answer
        return told | {
            "right": self.right,
            "tokens": generation.usage.completion_tokens,
            "ttft_s": self.ttft_s,
            "time_per_token_ms": generation.timing.per_token_s * 1e3,
            "coverage": generation.coverage,
            "index_kinds": list(generation.index_kinds),
            "work": work_as_json(generation.work),
            "prompt_work": work_as_json(generation.prompt_work),
            "timing": dataclasses.asdict(generation.timing),
        }


@dataclass(frozen=True, slots=True)
class Report:
    """The whole tour. `ingest_s` and `index_ready_s` run from the start of the upload.

    `early` is an answer given while the index was still building, where there was time for one.
    """

    context: Context
    source: str
    ingest_s: float
    index_ready_s: float
    answers: tuple[Answer, ...]
    nodes: int
    early: Answer | None = None
    prefill: str = "dense"
    dtype: str = ""

    @property
    def right(self) -> bool:
        """Whether every answer is, the early one too."""
        early = () if self.early is None else (self.early,)
        return all(answer.right for answer in (*self.answers, *early))

    @property
    def work(self) -> Work:
        """Work of the decode steps of all answers."""
        return total_work([answer.generation.work for answer in self.answers])

    def as_json(self) -> dict[str, Any]:
        """The figures of run-report.json: times are medians over the answers, work their sum."""
        generations = [answer.generation for answer in self.answers]
        work = work_as_json(self.work)
        report = {
            "document_tokens": self.context.tokens,
            "answers": [answer.as_json() for answer in self.answers],
            "ingest_s": self.ingest_s,
            "index_ready_s": self.index_ready_s,
            "ttft_s": statistics.median(answer.ttft_s for answer in self.answers),
            "time_per_token_ms": statistics.median(
                generation.timing.per_token_s * 1e3 for generation in generations
            ),
            **{name: value for name, value in work.items() if name.endswith("_fraction")},
            "coverage": min(generation.coverage for generation in generations),
            "resident_kv_bytes": max(each.resident_kv_bytes for each in generations),
            "full_kv_bytes": max(each.full_kv_bytes for each in generations),
            "nodes": self.nodes,
            "found": self.context.found,
            "context_id": self.context.id,
            "document_source": self.source,
            "node_kv_bytes": self.context.kv_bytes,
            "index_kind": self.context.index_kind,
            "index_bytes": self.context.index_bytes,
            "placement": self.context.shard_map.reason,
            "prefill": self.prefill,
            "dtype": self.dtype,
        }
        if self.early is not None:
            report["answered_while_indexing"] = self.early.as_json()
        return report

    def write(self, path: Path) -> None:
        """Writes the figures as JSON."""
        path.write_text(json.dumps(self.as_json(), indent=2, ensure_ascii=False) + "\n")

    def print(self, console: Console) -> None:
        """Prints the answers and the figures as tables."""
        console.print(_answers_table(self), _figures_table(self), sep="\n\n")


def _answers_table(report: Report) -> Table:
    verified = any(answer.full_attention_answer is not None for answer in report.answers)
    texts = ("answer", "hidden fact", *(["full attention"] if verified else []), "")
    figures = ("by", "TTFT", "ms/token", "scanned", "sketched", "attended", "bytes")
    table = Table(*texts, *figures, box=None)
    early = () if report.early is None else (report.early,)
    for answer in (*early, *report.answers):
        work = answer.generation.work
        table.add_row(
            answer.answer,
            answer.expected,
            *([answer.full_attention_answer or ""] if verified else []),
            "[green]right[/]" if answer.right else "[red]WRONG[/]",
            "+".join(answer.generation.index_kinds),
            f"{answer.ttft_s:.2f} s",
            f"{answer.generation.timing.per_token_s * 1e3:.0f}",
            f"{work.scan_fraction:.2%}",
            f"{work.sketch_fraction:.2%}",
            f"{work.attended_fraction:.2%}",
            f"{work.bytes_fraction:.2%}",
        )
    return table


def _figures_table(report: Report) -> Table:
    told = report.as_json()
    stored = "found again" if report.context.found else "stored"
    saved = told["full_kv_bytes"] / max(1, told["resident_kv_bytes"])
    rows = {
        "document": f"{told['document_tokens']:,} tokens: {report.source}",
        "ingest": f"{stored} in {report.ingest_s:.1f} s; index complete after "
        f"{report.index_ready_s:.1f} s ({told['index_kind']}); prefill {report.prefill}, "
        f"{report.dtype}",
        "time to first token": f"{told['ttft_s']:.2f} s (median)",
        "time per token": f"{told['time_per_token_ms']:.0f} ms (median)",
        "scan fraction": f"{told['scan_fraction']:.3%} of the keys in scope were read in full",
        "sketch fraction": f"{told['sketch_fraction']:.3%} were scored by a code",
        "attended fraction": f"{told['attended_fraction']:.3%} entered the softmax",
        "bytes fraction": f"{told['bytes_fraction']:.3%} of the bytes of K and V were read",
        "coverage": f"{told['coverage']:.3f} of the context answered",
        "KV on the worker": f"{told['resident_kv_bytes'] / 2**20:,.2f} MiB resident; all of it "
        f"would be {told['full_kv_bytes'] / 2**20:,.2f} MiB, {saved:,.0f}x",
        "KV on the nodes": f"{told['node_kv_bytes'] / 2**20:,.1f} MiB and "
        f"{told['index_bytes'] / 2**20:,.1f} MiB of index on {report.nodes} nodes",
        "placement": told["placement"],
    }
    table = Table(show_header=False, box=None)
    for name, text in rows.items():
        table.add_row(name, text)
    return table
