"""RULER's question answering: the documents of a question hidden among others (section 3.4).

qa_1 reads SQuAD v2 (`--squad dev-v2.0.json`), qa_2 HotpotQA (`--hotpotqa
hotpot_dev_distractor_v1.json`), each as published; neither is downloaded here. Questions are taken
in the file's order, other documents of the same article first, and any one reference counts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from evaluation.tasks.base import Sample, Sources, Spec, Task, register
from evaluation.tasks.draft import Draft, Query, fit
from evaluation.tasks.haystack import NOISE
from longreach.errors import InvalidRequest

ANSWER_TOKENS = 32

_INSTRUCTION = (
    "Answer the question based on the given documents. "
    "Only give me the answer and do not output any other words.\n\n"
)
_PREAMBLE = _INSTRUCTION + "The following are given documents.\n\n"
_QUESTION = "\n\n" + _INSTRUCTION + "Question: {question} Answer:"


@dataclass(frozen=True)
class Asked:
    """A question; `gold` and `near` are indices of its own and of related documents."""

    text: str
    references: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class Corpus:
    """Distinct documents and the questions about them."""

    documents: tuple[str, ...]
    questions: tuple[Asked, ...]


class QuestionAnswering(Task):
    """qa_1 or qa_2, by the field of Sources its file comes from."""

    suite: ClassVar[str] = "ruler_qa"

    def __init__(self, name: str, summary: str, source: str) -> None:
        super().__init__(name, summary)
        self._source = source

    def check(self, sources: Sources) -> None:
        """Reads the file."""
        self._corpus(sources)

    def samples(self, spec: Spec) -> list[Sample]:
        """One sample."""
        corpus = self._corpus(spec.sources)
        asked = corpus.questions[spec.index % len(corpus.questions)]
        order = document_order(asked, len(corpus.documents), spec.rng(self.name))
        query = Query(
            _QUESTION.format(question=asked.text),
            asked.references,
            ANSWER_TOKENS,
            "string_match_part",
        )
        salt = f"{self.name}/{spec.seed}/{spec.index}"

        def write(count: int) -> Draft:
            chosen = order[:count]
            random.Random(f"{salt}/{count}").shuffle(chosen)
            numbered = [f"Document {i}:\n{corpus.documents[d]}" for i, d in enumerate(chosen, 1)]
            return Draft(_PREAMBLE, "\n\n".join(numbered), (query,), NOISE + "\n")

        return fit(self.name, spec, write, least=len(asked.gold), most=len(order))

    def _corpus(self, sources: Sources) -> Corpus:
        path: Path | None = getattr(sources, self._source)
        if path is None:
            raise InvalidRequest(
                f"task {self.name} reads a dataset that is not part of longreach; "
                f"pass its file with --{self._source}"
            )
        return _load(self._source, path)


def document_order(asked: Asked, documents: int, rng: random.Random) -> list[int]:
    """Documents in the order they are taken: the question's own, related ones, all others."""
    near = list(asked.near)
    rng.shuffle(near)
    taken = {*asked.gold, *near}
    others = [index for index in range(documents) if index not in taken]
    rng.shuffle(others)
    return [*asked.gold, *near, *others]


@cache
def _load(source: str, path: Path) -> Corpus:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        corpus = _from_squad(content) if source == "squad" else _from_hotpotqa(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(
            f"cannot read {path} as {source}: {error!r}; give the file as it is published"
        ) from error
    if not corpus.questions:
        raise InvalidRequest(f"{path} has no answerable question")
    return corpus


def _from_squad(content: Any) -> Corpus:
    paragraphs = [
        (a, p) for a, article in enumerate(content["data"]) for p in article["paragraphs"]
    ]
    documents, index_of = _distinct(p["context"] for _, p in paragraphs)
    of_article: dict[int, list[int]] = {}
    for article, paragraph in paragraphs:
        of_article.setdefault(article, []).append(index_of[paragraph["context"]])
    questions = []
    for article, paragraph in paragraphs:
        gold = index_of[paragraph["context"]]
        near = tuple(i for i in dict.fromkeys(of_article[article]) if i != gold)
        questions += [
            Asked(qa["question"], tuple(answer["text"] for answer in qa["answers"]), (gold,), near)
            for qa in paragraph["qas"]
            if not qa.get("is_impossible") and qa["answers"]
        ]
    return Corpus(documents, tuple(questions))


def _from_hotpotqa(content: Any) -> Corpus:
    listed = [[f"{title}\n{''.join(text)}" for title, text in item["context"]] for item in content]
    documents, index_of = _distinct(text for texts in listed for text in texts)
    questions = [
        Asked(item["question"], (item["answer"],), tuple(dict.fromkeys(index_of[t] for t in texts)))
        for item, texts in zip(content, listed, strict=True)
    ]
    return Corpus(documents, tuple(questions))


def _distinct(texts: Iterable[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    index_of: dict[str, int] = {}
    for text in texts:
        index_of.setdefault(text, len(index_of))
    return tuple(index_of), index_of


register(QuestionAnswering("qa_1", "SQuAD questions, with --squad", "squad"))
register(QuestionAnswering("qa_2", "HotpotQA questions, with --hotpotqa", "hotpotqa"))
