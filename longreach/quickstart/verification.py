"""The same questions under full attention, by the worker's reference program."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from longreach.errors import Internal


def full_attention_answers(
    model: str, text: str, questions: Sequence[str], *, max_tokens: int, stop: str
) -> list[str]:
    """Answers of the model with every key in every layer, greedy; runs in a process of its own.

    Raises Internal with the end of the program's messages when it fails.
    """
    with tempfile.TemporaryDirectory() as directory:
        document = Path(directory, "document.txt")
        document.write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "gpu_worker.reference", "--model", model]
        command += ["--document", str(document), "--max-tokens", str(max_tokens), "--stop", stop]
        for question in questions:
            command += ["--question", question]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Internal(
            f"gpu_worker.reference ended with status {done.returncode}:\n{done.stderr[-2000:]}"
        )
    answers: list[str] = json.loads(done.stdout)["answers"]
    return [answer.strip() for answer in answers]
