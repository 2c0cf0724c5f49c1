"""What `longreach eval --list` prints."""

from __future__ import annotations

import evaluation.methods
from evaluation.diffuse import DIFFUSE
from evaluation.tasks import TASKS
from gpu_worker.patterns import PATTERNS
from library.decode import decode_names
from retrieval_node.index.base import INDEX_KINDS


def listing() -> str:
    """Tasks by suite with what they ask, then methods and index kinds."""
    suites: dict[str, list[str]] = {}
    for name in TASKS:
        task = TASKS[name]
        suites.setdefault(task.suite, []).append(f"  {name:20} {task.summary}")
    tasks = "\n".join(f"\n{suite}\n" + "\n".join(lines) for suite, lines in suites.items())
    parts = [
        "Tasks, by suite; the name of a suite stands for all of its tasks.",
        tasks.lstrip("\n"),
        "without a model",
        f"  {DIFFUSE:20} output error of every method on a head that 100 keys do not carry\n",
        (evaluation.methods.__doc__ or "").strip() + "\n",
        f"DECODE is one of {', '.join(decode_names())}.",
        f"PREFILL is one of {', '.join(PATTERNS)}.",
        f"INDEX is one of {', '.join(INDEX_KINDS)}.",
    ]
    return "\n".join(parts)
