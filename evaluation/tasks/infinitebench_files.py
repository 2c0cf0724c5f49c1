"""InfiniteBench's tasks over books, scripts and code, from a local copy of the dataset.

`--infinitebench DIR` names the directory with the JSONL files as published on Hugging Face
(xinrongzhang2022/InfiniteBench): id, context, input, answer, options. A context that is too long
keeps its beginning and its end, as in the published evaluation; a shorter one stays as it is, so
these samples take at most the length, not exactly.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from evaluation.tasks.base import Sample, Sources, Spec, Task, register
from longreach.errors import InvalidRequest

_LETTERS = "ABCD"
_CHOICES = "\nA. {A}\nB. {B}\nC. {C}\nD. {D}"


@dataclass(frozen=True)
class Form:
    """How a task is asked: texts around the context (base-model form), tokens and scorer."""

    before: str
    after: str
    answer_tokens: int
    scorer: str


class DatasetTask(Task):
    """One file of the dataset."""

    suite: ClassVar[str] = "infinitebench_files"

    def __init__(self, name: str, summary: str, form: Form) -> None:
        super().__init__(name, summary)
        self._form = form

    def check(self, sources: Sources) -> None:
        """Reads the file."""
        self._records(sources)

    def samples(self, spec: Spec) -> list[Sample]:
        """One sample: the file's record with this index, from the start again after the last."""
        records = self._records(spec.sources)
        record = records[spec.index % len(records)]
        encoder, form = spec.encoder, self._form
        options = dict(zip(_LETTERS, record.get("options") or [""] * 4, strict=False))
        question = encoder.encode(form.after.format(question=record["input"], **options))
        head = [*encoder.start_ids, *encoder.encode(form.before)]
        text = encoder.encode(record["context"])
        room = spec.length - len(head) - len(question) - form.answer_tokens
        if room < 1:
            raise InvalidRequest(
                f"task {self.name} needs {spec.length - room} tokens besides its text; "
                f"the length is {spec.length}: ask for a longer one"
            )
        return [
            Sample(
                context_ids=(*head, *keep_both_ends(text, room)),
                question_ids=tuple(question),
                references=references(record),
                answer_tokens=form.answer_tokens,
                scorer=form.scorer,
                metadata={
                    "id": record.get("id", spec.index),
                    "cut_tokens": max(0, len(text) - room),
                },
            )
        ]

    def _records(self, sources: Sources) -> tuple[dict[str, Any], ...]:
        if sources.infinitebench is None:
            raise InvalidRequest(
                f"task {self.name} reads a dataset that is not part of longreach; "
                "pass its directory with --infinitebench"
            )
        return _load(sources.infinitebench / f"{self.name}.jsonl")


def keep_both_ends(ids: list[int], room: int) -> list[int]:
    """At most `room` ids: the first half and the last half of them."""
    if len(ids) <= room:
        return ids
    first = room // 2
    return ids[:first] + ids[len(ids) - (room - first) :]


def references(record: dict[str, Any]) -> tuple[str, ...]:
    """Answers of a record; a chosen option comes with its letter in front of it."""
    answer = record["answer"]
    answers = [str(each) for each in (answer if isinstance(answer, list) else [answer])]
    options = [str(option) for option in record.get("options") or ()]
    letters = [_LETTERS[options.index(each)] for each in answers if each in options]
    return tuple(letters + answers)


@cache
def _load(path: Path) -> tuple[dict[str, Any], ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        records = tuple(json.loads(line) for line in lines if line.strip())
        for record in records:
            references(record)
            record["context"], record["input"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(
            f"cannot read {path} as InfiniteBench: {error!r}; give the directory of the dataset's "
            "JSONL files"
        ) from error
    if not records:
        raise InvalidRequest(f"{path} has no record")
    return records


_FORMS: dict[str, tuple[str, Form]] = {
    "longbook_sum_eng": (
        "En.Sum: summarise a book",
        Form("Summarize the book below.\n\n", "\n\nSummary:", 1200, "rouge_l_sum"),
    ),
    "longbook_qa_eng": (
        "En.QA: a question about a book",
        Form(
            "Read the book and answer the question. Be very concise in your answer.\n\n",
            "\n\nQuestion: {question}\nAnswer:",
            40,
            "qa_f1",
        ),
    ),
    "longbook_choice_eng": (
        "En.MC: a multiple-choice question about a book",
        Form(
            "Read the book and answer the question.\n\n",
            "\n\nQuestion: {question}" + _CHOICES + "\n\nThe letter of the correct answer is",
            40,
            "choice",
        ),
    ),
    "longdialogue_qa_eng": (
        "En.Dia: who was masked in a script",
        Form(
            "Below is a dialogue script where one random occurrence of a character name is "
            'replaced with "$$MASK$$", and you should try to guess who that character is.\n\n',
            "\n\nThe name that has been replaced with $$MASK$$ is likely",
            40,
            "dialogue_name",
        ),
    ),
    "code_debug": (
        "Code.Debug: which function was broken",
        Form(
            "Following is a Python code where exactly one of the functions/methods has a "
            "deliberate error that makes it crash.\n\n",
            "\n\nOptions:" + _CHOICES + "\n\nThe correct option is:",
            5,
            "code_debug",
        ),
    ),
    "longbook_qa_chn": (
        "Zh.QA: a question about a Chinese book",
        Form("阅读以下书籍然后回答问题。\n\n", "\n\n问题：{question}\n答案：", 40, "qa_f1_zh"),
    ),
}

for _name, (_summary, _form) in _FORMS.items():
    register(DatasetTask(_name, f"{_summary}, with --infinitebench", _form))
