"""Every answer as a line of a JSONL file, written at once, so that a run can be resumed.

The first line says what makes answers comparable: model, seed, essay and cluster settings. Answers
of another configuration are never mixed in. Tasks, lengths, methods and n may grow from run to run.
Lines {"elapsed_s": ...} between them add up to the time all runs together took.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from longreach.errors import InvalidRequest
from longreach.types import WorkFigures

Key = tuple[str, str, int, int, int]
"""method, task, length, haystack, question."""


@dataclass(frozen=True, slots=True)
class Record:
    """One answer.

    haystack: index of the task's haystack of this length; question: of `questions` over it.
    score in [0, 1]. context_tokens, generated_tokens: counts. metadata: of the sample. work: None
    for full attention. resident_share: KV on the worker / KV of all positions. prefill_density:
    (row, key) pairs attended / visible in the context's prefill, where it is known.
    """

    method: str
    task: str
    suite: str
    length: int
    haystack: int
    question: int
    questions: int
    score: float
    answer: str
    references: tuple[str, ...]
    context_tokens: int
    generated_tokens: int
    seconds: float
    metadata: Mapping[str, Any]
    work: WorkFigures | None = None
    resident_share: float = 1.0
    index_kinds: tuple[str, ...] = ()
    prefill_density: float | None = None

    @property
    def column(self) -> str:
        """The task, and of a mixed task the kind of question too."""
        kind = self.metadata.get("kind")
        return f"{self.task}/{kind}" if kind else self.task

    @property
    def key(self) -> Key:
        """What tells this answer from others."""
        return self.method, self.task, self.length, self.haystack, self.question


TICK_S = 10.0
"""Of a run that is killed, no more than this is missing in the time that all runs took."""


class ResultsFile:
    """Answers kept in a file; a context manager that holds it open for appending."""

    def __init__(self, path: Path, configuration: Mapping[str, Any]) -> None:
        self.path = path
        # As JSON would give it back, so that the comparison with a file's first line is fair.
        self.configuration = json.loads(json.dumps(dict(configuration)))
        self._records: dict[Key, Record] = {}
        self._elapsed_s = 0.0
        self._since = time.monotonic()
        self._file: TextIO | None = None

    @property
    def records(self) -> tuple[Record, ...]:
        """Every answer, old and new."""
        return tuple(self._records.values())

    @property
    def elapsed_s(self) -> float:
        """Seconds that this run and those before it took, up to the last `tick`."""
        return self._elapsed_s

    def __enter__(self) -> ResultsFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = list(_whole_lines(self.path))
        if lines:
            self._check(lines[0])
            for line in lines[1:]:
                if "elapsed_s" in line:
                    self._elapsed_s += line["elapsed_s"]
                    continue
                record = _from_json(line)
                self._records[record.key] = record
        # Rewritten without the half line that a killed run may have left.
        partial = self.path.with_name(self.path.name + ".partial")
        header = {"configuration": self.configuration}
        partial.write_text("".join(json.dumps(line) + "\n" for line in [header, *lines[1:]]))
        partial.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._since = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self.tick()
            self._file.close()
            self._file = None

    def append(self, record: Record) -> None:
        """Keeps an answer; it is in the file when this returns."""
        self._records[record.key] = record
        self._write(dataclasses.asdict(record))
        if time.monotonic() - self._since > TICK_S:
            self.tick()

    def tick(self) -> None:
        """Keeps the time since the last tick, or since the file was opened."""
        now = time.monotonic()
        self._write({"elapsed_s": round(now - self._since, 3)})
        self._elapsed_s += now - self._since
        self._since = now

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            raise RuntimeError("ResultsFile needs `with` before anything is written")
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def has(self, key: Key) -> bool:
        """Whether this answer is there."""
        return key in self._records

    def has_haystack(self, method: str, task: str, length: int, haystack: int) -> bool:
        """Whether the method has answered every question over this haystack."""
        first = self._records.get((method, task, length, haystack, 0))
        return first is not None and all(
            (method, task, length, haystack, question) in self._records
            for question in range(first.questions)
        )

    def _check(self, header: Mapping[str, Any]) -> None:
        found = header.get("configuration", {})
        if found != self.configuration:
            different = sorted(
                name
                for name in {*found, *self.configuration}
                if found.get(name) != self.configuration.get(name)
            )
            raise InvalidRequest(
                f"{self.path} holds answers of another configuration (different: "
                f"{', '.join(different)}); give another --json path, or delete it"
            )


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            return
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise InvalidRequest(
                f"{path}, line {number} is not JSON ({error}); delete the line to ask it again"
            ) from None


def _from_json(line: Mapping[str, Any]) -> Record:
    fields = dict(line)
    work = fields.pop("work")
    return Record(
        **{
            **fields,
            "references": tuple(fields["references"]),
            "index_kinds": tuple(fields["index_kinds"]),
            "work": None if work is None else WorkFigures(**work),
        }
    )
