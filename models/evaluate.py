"""Measures retrieval under full attention: `python -m models.evaluate --lengths 4096 32768`.

For each length and each kind of haystack (`haystacks.py`) it prefills some contexts and asks every
question on each. A question counts as right only if greedy decoding gives the exact answer. Partial
results are written after every context, and the same command continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from models.haystacks import HAYSTACKS, make_context
from models.longcontext import LongContext
from models.tasks import Question

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_DEFAULT_LENGTHS = (4096, 16384, 32768, 65536, 131072)

Result = dict[str, Any]
"""One context's result as it stands in the JSON file:

haystack, dtype: str. length: tokens allowed. seed: int. tokens: haystack tokens. prefill_s, ask_s:
seconds. answers: {task: [right, asked]}. stops: [right answers followed by terminator and EOS,
right answers]; counted apart, because an exact answer does not need it.
"""


@dataclass(frozen=True)
class Job:
    """One context to measure."""

    model: str
    dtype: str
    haystack: str
    length: int
    seed: int

    @property
    def name(self) -> tuple[str, str, int, int]:
        """What tells this job's result from others in the file."""
        return self.dtype, self.haystack, self.length, self.seed


def measure(job: Job) -> Result:
    """Prefills the job's context and asks all its questions."""
    model, tokenizer = _load(job.model, job.dtype)
    context = make_context(job.haystack, job.length, job.seed, tokenizer.backend_tokenizer)
    session = LongContext(model, job.length)
    started = time.perf_counter()
    session.prefill(tokenizer(context.text)["input_ids"])
    prefilled = time.perf_counter()
    answers: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    stops = [0, 0]
    for question in context.questions:
        is_right, stopped = ask(session, question, tokenizer)
        answers[question.task][0] += is_right
        answers[question.task][1] += 1
        stops[0] += is_right and stopped
        stops[1] += is_right
    return {
        "haystack": job.haystack,
        "dtype": job.dtype,
        "length": job.length,
        "seed": job.seed,
        "tokens": context.tokens,
        "prefill_s": round(prefilled - started, 2),
        "ask_s": round(time.perf_counter() - prefilled, 2),
        "answers": dict(answers),
        "stops": stops,
    }


def ask(
    session: LongContext, question: Question, tokenizer: PreTrainedTokenizerFast
) -> tuple[bool, bool]:
    """Whether greedy decoding gives the answer, and whether it then closes it and stops."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    prompt, answer = encode(question.prompt), encode(question.answer)
    ending = [*encode(question.terminator), tokenizer.eos_token_id]
    wanted = answer + ending
    predicted = session.predict(prompt + wanted)[len(prompt) - 1 : -1]
    return predicted[: len(answer)] == answer, predicted[len(answer) :] == ending


@cache
def _load(model: str, dtype: str) -> tuple[Any, PreTrainedTokenizerFast]:
    torch.set_num_threads(1)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=_DTYPES[dtype])
    return loaded.eval(), AutoTokenizer.from_pretrained(model)


def run(jobs: Sequence[Job], path: Path, processes: int) -> list[Result]:
    """Measures the jobs that `path` has no result for; returns all results, old and new."""
    results: list[Result] = json.loads(path.read_text()) if path.exists() else []
    done = {(r["dtype"], r["haystack"], r["length"], r["seed"]) for r in results}
    missing = [job for job in jobs if job.name not in done]
    started = time.perf_counter()
    for count, result in enumerate(_measure_all(missing, processes), start=1):
        results.append(result)
        partial = path.with_suffix(".partial")
        partial.write_text("[\n" + ",\n".join(json.dumps(r) for r in results) + "\n]\n")
        partial.replace(path)
        left = (time.perf_counter() - started) / count * (len(missing) - count)
        print(
            f"{count}/{len(missing)}  {result['length']:>6} {result['haystack']:8} "
            f"{result['dtype']} #{result['seed']}  prefill {result['prefill_s']:.1f} s  "
            f"ask {result['ask_s']:.1f} s  {result['answers']}  about {left / 60:.1f} min left",
            flush=True,
        )
    return results


def _measure_all(jobs: Sequence[Job], processes: int) -> Iterator[Result]:
    if processes == 1:
        yield from map(measure, jobs)
        return
    with mp.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(measure, jobs)


def table(results: Iterable[Result]) -> str:
    """A Markdown table: a row per task, haystack and dtype, a column per length, `share (n)`."""
    cells: dict[tuple[str, str, str], dict[int, list[int]]] = defaultdict(dict)
    for result in results:
        for task, (right, asked) in result["answers"].items():
            row = cells[task, result["haystack"], result["dtype"]]
            total = row.setdefault(result["length"], [0, 0])
            total[0] += right
            total[1] += asked
    lengths = sorted({length for row in cells.values() for length in row})
    lines = [
        "| task | haystack | dtype | " + " | ".join(f"{n // 1024}K" for n in lengths) + " |",
        "|---|---|---|" + "---|" * len(lengths),
    ]
    for (task, haystack, dtype), row in sorted(cells.items(), key=_row_order):
        shares = [f"{row[n][0] / row[n][1]:.3f} ({row[n][1]})" if n in row else "" for n in lengths]
        lines.append(f"| {task} | {haystack} | {dtype} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def _row_order(item: tuple[tuple[str, str, str], object]) -> tuple[str, int, str]:
    task, haystack, dtype = item[0]
    return dtype, HAYSTACKS.index(haystack), task


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, measures what is missing and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m models.evaluate", description=__doc__)
    parser.add_argument("--model", default="models/demo", help="directory of Hugging Face files")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(_DEFAULT_LENGTHS))
    parser.add_argument("--haystacks", nargs="+", choices=HAYSTACKS, default=list(HAYSTACKS))
    parser.add_argument("--contexts", type=int, default=5, help="contexts per length and haystack")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="bf16")
    parser.add_argument("--processes", type=int, default=1, help="single-threaded processes")
    parser.add_argument("--json", type=Path, default=Path("evaluation.json"), help="results file")
    given = parser.parse_args(arguments)
    jobs = [
        Job(given.model, given.dtype, haystack, length, seed)
        for length in given.lengths
        for seed in range(given.contexts)
        for haystack in given.haystacks
    ]
    results = run(jobs, given.json, given.processes)
    print(table(results))
    right = sum(result["stops"][1] for result in results)
    stopped = sum(result["stops"][0] for result in results)
    print(f"\nOf {right} right answers, {stopped} were closed and followed by EOS.")


if __name__ == "__main__":
    main()
