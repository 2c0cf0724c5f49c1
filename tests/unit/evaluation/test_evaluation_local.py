"""Methods in this process, as `--methods` names them, on a tiny random model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.encoding import load_encoder
from evaluation.local import Contexts, FullAnswerer, LocalAnswerer
from evaluation.methods import Deployment, group_methods, open_answerers, parse_methods
from evaluation.results import ResultsFile
from evaluation.runner import Plan, run
from evaluation.tasks import select_tasks
from gpu_worker.model import load_model
from library.decode import parse_decode
from longreach.errors import InvalidRequest

TinyModel = Callable[[str], Path]
CONTEXT = tuple(range(3, 203)) * 2
QUESTION = tuple(range(40, 60))


class Unwatched:
    """Nobody watches."""

    def stage(self, text: str) -> None:
        """Nothing."""

    def answered(self, haystacks: int) -> None:
        """Nothing."""


def quiet(_: str) -> None:
    """Nobody watches."""


def test_commas_separate_methods_and_their_parameters_alike() -> None:
    text = (
        "full,local/streaming_llm:sink=128,window=512,local/sketch:mass=0.98[64,4096]+tail,sink=4,"
        "cluster:exact, local/full@vertical_slash:verticals=500,slashes=1500,local/quest"
    )
    assert [method.name for method in parse_methods([text])] == [
        "full",
        "local/streaming_llm:sink=128,window=512",
        "local/sketch:mass=0.98[64,4096]+tail,sink=4",
        "cluster:exact",
        "local/full@vertical_slash:verticals=500,slashes=1500",
        "local/quest",
    ]


def test_a_methods_configuration_names_what_its_name_leaves_out() -> None:
    method, whole, sparse = parse_methods(
        ["local/snapkv:window=16", "local/flat:prompt=whole,top_k=9", "local/full@a_shape"]
    )
    assert method.configuration == (
        "snapkv:capacity=4096,window=16,kernel=7,pooling=max@dense, prompt=stored"
    )
    assert whole.configuration == "flat:top_k=9,sink=128,window=512@dense, prompt=whole"
    assert sparse.configuration.startswith("full@a_shape:sink_tokens=")


def test_methods_of_one_prefill_share_a_group_with_full_attention() -> None:
    names = ["full", "local/quest@a_shape", "cluster:exact", "local/flat", "local/full@a_shape"]
    groups = [[method.name for method in group] for group in group_methods(parse_methods(names))]
    assert groups == [
        ["full", "local/flat"],
        ["local/quest@a_shape", "local/full@a_shape"],
        ["cluster:exact"],
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("local/h2o", "unknown decode method 'h2o'; known: .*streaming_llm"),
        ("local/snapkv:budget=3", "no parameter 'budget'; it has capacity"),
        ("local/full@random", "unknown prefill pattern 'random'"),
        ("local/full@a_shape:window=3", "no parameter 'window'"),
        ("local/flat:prompt=half", "prompt is 'half'; it must be stored or whole"),
        ("streaming_llm", r"write full, .*local/DECODE.*streaming_llm"),
    ],
)
def test_wrong_names_are_told_what_is_right(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse_methods([text])


def test_a_context_is_prefilled_once_and_freed_by_its_last_user(tiny_model: TinyModel) -> None:
    contexts = Contexts(load_model(str(tiny_model("llama"))))
    full = FullAnswerer(contexts)
    few = LocalAnswerer(contexts, parse_decode("flat:top_k=4,sink=4,window=64"))
    exact = LocalAnswerer(contexts, parse_decode("flat:exact,sink=4,window=64"), "whole")
    told: list[str] = []
    handles = [answerer.prefill(CONTEXT, 40, told.append) for answerer in (full, few, exact)]
    assert told == ["prefill"]
    assert handles[0].context is handles[2].context
    want = full.answer(handles[0], QUESTION, 8)
    assert want.work is None
    assert exact.answer(handles[2], QUESTION, 8).ids == want.ids
    answer = few.answer(handles[1], QUESTION, 8)
    assert answer.work is not None
    assert 0 < answer.work.attended_fraction < 0.5
    assert answer.index_kinds == ("flat",)
    # Sink, a window of 64 to 127 and what was fed after the context.
    assert 68 / 428 < answer.resident_share < (4 + 127 + 27) / 400
    assert answer.prefill_density == 1
    for answerer, handle in zip((full, few, exact), handles, strict=True):
        answerer.release(handle)
    full.prefill(CONTEXT, 40, told.append)
    assert told == ["prefill", "prefill"]


def test_a_run_asks_prefill_and_decode_methods_on_the_same_samples(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = str(tiny_model("llama"))
    methods = parse_methods(
        [
            "full,local/full,local/flat:exact,local/streaming_llm:sink=4,window=16",
            "local/infllm:window=64,blocks=2,local/snapkv:capacity=64,window=8,prompt=whole",
            "local/full@a_shape:sink_tokens=64,window_tokens=64",
        ]
    )
    plan = Plan(tuple(select_tasks(["passkey"])), (1024,), tuple(methods), 1)
    with ResultsFile(tmp_path / "run.jsonl", {}) as store:
        run(
            plan,
            load_encoder(path),
            lambda group: open_answerers(group, Deployment(path)),
            store,
            Unwatched(),
        )
        found = {record.method: record for record in store.records}
    assert set(found) == {method.name for method in methods}
    assert len({record.references for record in found.values()}) == 1
    for exact in ("local/full", "local/flat:exact"):
        assert found[exact].answer == found["full"].answer
        work = found[exact].work
        assert work is not None
        assert work.attended_fraction == 1
    dropped = found["local/streaming_llm:sink=4,window=16"]
    assert dropped.work is not None
    assert dropped.work.attended_fraction < 0.03
    assert dropped.resident_share < 0.03
    assert found["full"].prefill_density is None
    sparse = found["local/full@a_shape:sink_tokens=64,window_tokens=64"]
    assert sparse.prefill_density is not None
    assert 0.1 < sparse.prefill_density < 0.5
