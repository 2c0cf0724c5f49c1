"""Tasks over a user's files, with small files of the published form."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from evaluation.encoding import Encoder
from evaluation.tasks import TASKS, Sample, Sources, Spec
from longreach.errors import InvalidRequest


def write_squad(path: Path) -> Path:
    def paragraph(article: int, number: int) -> dict[str, Any]:
        text = (
            f"Article {article}, paragraph {number}: the lake is {article * 100 + number} m deep."
        )
        asked = f"How deep is the lake of article {article}, paragraph {number}?"
        answer = f"{article * 100 + number} m"
        return {
            "context": text,
            "qas": [
                {"question": "Who knows?", "answers": [], "is_impossible": True},
                {"question": asked, "answers": [{"text": answer}, {"text": answer + " deep"}]},
            ],
        }

    articles = [{"paragraphs": [paragraph(a, n) for n in range(6)]} for a in range(1, 30)]
    path.write_text(json.dumps({"data": articles}))
    return path


def write_hotpotqa(path: Path) -> Path:
    items = [
        {
            "question": f"Which colour has item {i}?",
            "answer": f"colour{i}",
            "context": [
                [f"Title {i}-{j}", [f"Item {i}. ", f"It is colour{i}."]] for j in range(10)
            ],
        }
        for i in range(20)
    ]
    path.write_text(json.dumps(items))
    return path


def one(
    task: str, sources: Sources, encoder: Encoder, length: int = 4096, index: int = 3
) -> Sample:
    (sample,) = TASKS[task].samples(Spec(length, index, 0, encoder, sources))
    return sample


def test_squad_documents_hold_the_answer_and_the_same_article_first(
    tmp_path: Path, byte_encoder: Encoder
) -> None:
    sources = Sources(squad=write_squad(tmp_path / "squad.json"))
    sample = one("qa_1", sources, byte_encoder)
    context = byte_encoder.decode(sample.context_ids)
    documents = re.findall(r"Document \d+:\n(.*)", context)
    assert sample.references == ("103 m", "103 m deep")
    assert sample.tokens == 4096
    assert sum("Article 1," in document for document in documents) == 6
    assert sum("paragraph 3: the lake is 103 m" in document for document in documents) == 1
    assert len(set(documents)) == len(documents) > 20
    assert "article 1, paragraph 3?" in byte_encoder.decode(sample.question_ids)


def test_unanswerable_questions_are_left_out(tmp_path: Path, byte_encoder: Encoder) -> None:
    sources = Sources(squad=write_squad(tmp_path / "squad.json"))
    for index in range(4):
        sample = one("qa_1", sources, byte_encoder, index=index)
        assert b"Who knows" not in bytes(sample.question_ids)


def test_hotpotqa_keeps_all_documents_of_a_question(tmp_path: Path, byte_encoder: Encoder) -> None:
    sources = Sources(hotpotqa=write_hotpotqa(tmp_path / "hotpot.json"))
    sample = one("qa_2", sources, byte_encoder)
    context = byte_encoder.decode(sample.context_ids)
    assert sample.tokens == 4096
    assert all(f"Title 3-{j}" in context for j in range(10))
    assert sample.references == ("colour3",)


def test_more_room_than_documents_is_filled_up(tmp_path: Path, byte_encoder: Encoder) -> None:
    sources = Sources(hotpotqa=write_hotpotqa(tmp_path / "hotpot.json"))
    sample = one("qa_2", sources, byte_encoder, length=30_000)
    assert sample.tokens == 30_000
    assert byte_encoder.decode(sample.context_ids).count("Document ") == 200


@pytest.mark.parametrize(("task", "flag"), [("qa_1", "--squad"), ("qa_2", "--hotpotqa")])
def test_a_missing_or_foreign_file_is_refused_with_the_flag(
    task: str, flag: str, tmp_path: Path, byte_encoder: Encoder
) -> None:
    with pytest.raises(InvalidRequest, match=flag):
        one(task, Sources(), byte_encoder)
    foreign = tmp_path / "foreign.json"
    foreign.write_text('{"rows": []}')
    with pytest.raises(InvalidRequest, match="as it is published"):
        one(task, Sources(squad=foreign, hotpotqa=foreign), byte_encoder)


def write_infinitebench(directory: Path) -> Path:
    book = "".join(f"{i:05d} " for i in range(2000))
    options = ["Ann", "Bob", "Cleo", "Dan"]
    records: dict[str, dict[str, Any]] = {
        "longbook_sum_eng": {"answer": ["A book."], "options": []},
        "longbook_qa_eng": {"answer": ["Ann", "Anna"], "options": []},
        "longbook_choice_eng": {"answer": ["Cleo"], "options": options},
        "longdialogue_qa_eng": {"answer": ["BOB"], "options": []},
        "code_debug": {"answer": "Bob", "options": options},
        "longbook_qa_chn": {"answer": ["安"], "options": []},
    }
    for name, fields in records.items():
        line = {"id": 7, "context": book, "input": "Who?", **fields}
        (directory / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    return directory


FILE_TASKS = [name for name in TASKS if TASKS[name].suite == "infinitebench_files"]


@pytest.mark.parametrize("task", FILE_TASKS)
def test_a_long_text_keeps_both_ends(task: str, tmp_path: Path, byte_encoder: Encoder) -> None:
    sources = Sources(infinitebench=write_infinitebench(tmp_path))
    sample = one(task, sources, byte_encoder)
    context = byte_encoder.decode(sample.context_ids)
    assert sample.tokens == 4096
    assert "00000 00001 " in context
    assert context.endswith("01998 01999 ")
    kept = context[context.index("00000 ") :]
    assert sample.metadata["cut_tokens"] == 12_000 - len(kept)


def test_a_chosen_option_may_be_given_by_its_letter(tmp_path: Path, byte_encoder: Encoder) -> None:
    sources = Sources(infinitebench=write_infinitebench(tmp_path))
    assert one("longbook_choice_eng", sources, byte_encoder).references == ("C", "Cleo")
    assert one("code_debug", sources, byte_encoder).references == ("B", "Bob")
    assert one("longbook_qa_eng", sources, byte_encoder).references == ("Ann", "Anna")
    question = byte_encoder.decode(one("code_debug", sources, byte_encoder).question_ids)
    assert "\nA. Ann\nB. Bob\nC. Cleo\nD. Dan" in question


def test_a_short_text_stays_whole(tmp_path: Path, byte_encoder: Encoder) -> None:
    sources = Sources(infinitebench=write_infinitebench(tmp_path))
    sample = one("longbook_qa_eng", sources, byte_encoder, length=50_000)
    assert sample.metadata["cut_tokens"] == 0
    assert sample.tokens < 50_000


def test_a_missing_dataset_is_refused_with_the_flag(tmp_path: Path, byte_encoder: Encoder) -> None:
    with pytest.raises(InvalidRequest, match="--infinitebench"):
        one("code_debug", Sources(), byte_encoder)
    with pytest.raises(InvalidRequest, match=r"cannot read .*code_debug\.jsonl"):
        one("code_debug", Sources(infinitebench=tmp_path / "none"), byte_encoder)
