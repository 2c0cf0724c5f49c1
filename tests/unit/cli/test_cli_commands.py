"""The command line, run in process against a server that plays a script."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from longreach.cli.__main__ import main
from longreach.errors import FailedPrecondition, ResourceExhausted
from longreach.v1 import common_pb2
from longreach.v1 import generation_pb2 as pb


@pytest.fixture(autouse=True)
def _cluster_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGREACH_ADDRESS", address)


def _context(context_id: str = "ctx-1234abcd", name: str = "book", **fields: Any) -> pb.Context:
    fields = {"state": pb.CONTEXT_STATE_READY, "tokens": 1234, "index_fraction": 1.0, **fields}
    return pb.Context(context_id=context_id, name=name, **fields)


def _answer() -> list[pb.GenerateResponse]:
    work = common_pb2.WorkFigures(
        keys_in_scope=1000, keys_scanned=100, keys_sketched=1000, keys_attended=50,
        bytes_read=300, bytes_in_scope=1000, keys_covered=1000,
    )  # fmt: skip
    summary = pb.GenerateSummary(
        finish_reason=pb.FINISH_REASON_STOP,
        usage=pb.Usage(context_tokens=1234, completion_tokens=2),
        timing=pb.GenerationTiming(first_token_s=0.25, per_token_s=0.02),
        work=work,
        coverage=1.0,
    )
    tokens = [pb.GeneratedToken(token_id=i, text=text) for i, text in enumerate((" Ish", "mael"))]
    return [pb.GenerateResponse(tokens=tokens), pb.GenerateResponse(summary=summary)]


def test_ingest_prints_the_id_alone_on_stdout(
    service: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.create_replies = [pb.CreateContextResponse(context=_context(), found=False)]
    service.contexts = [_context()]
    path = tmp_path / "book.txt"
    path.write_text("Call me Ishmael.")

    assert main(["ingest", str(path), "--name", "book"]) == 0

    printed = capsys.readouterr()
    assert printed.out == "ctx-1234abcd\n"
    assert "stored 1,234 tokens" in printed.err
    assert service.received[0].options.name == "book"
    assert service.received[1].text == "Call me Ishmael."


def test_ingest_reads_standard_input(
    service: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service.create_replies = [pb.CreateContextResponse(context=_context(), found=True)]
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert main(["ingest", "-", "--no-wait"]) == 0
    assert service.received[1].text == "from a pipe"
    assert "found 1,234 tokens" in capsys.readouterr().err


def test_a_file_that_does_not_exist_is_wrong_use(
    service: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ingest", "/nowhere/book.txt"]) == 2
    assert "No such file" in capsys.readouterr().err


def test_ask_finds_the_context_by_name_and_shows_all_four_figures(
    service: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    service.contexts = [_context("ctx-other", "other"), _context()]
    service.generate_replies = _answer()

    assert main(["ask", "--context", "book", "--budget", "top_k=50", "Who?"]) == 0

    printed = capsys.readouterr()
    assert printed.out == " Ishmael\n"
    for figure in ("scanned 10.00%", "sketched 100.00%", "attended 5.00%", "read 30.00%"):
        assert figure in printed.err
    (request,) = service.received
    assert request.context_id == "ctx-1234abcd"
    assert request.text == "Who?"
    assert request.budget.top_k == 50


def test_ask_takes_the_start_of_an_id(service: Any) -> None:
    service.contexts = [_context("ctx-other", "other"), _context()]
    service.generate_replies = _answer()
    assert main(["ask", "--context", "ctx-1234", "Who?"]) == 0
    assert service.received[0].context_id == "ctx-1234abcd"


def test_ask_json_is_one_object_with_counts_and_fractions(
    service: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    service.generate_replies = _answer()
    assert main(["ask", "--json", "--max-tokens", "3", "--seed", "7", "Who?"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["text"] == " Ishmael"
    assert printed["work"]["keys_scanned"] == 100
    assert printed["work"]["sketch_fraction"] == 1.0
    assert printed["usage"]["completion_tokens"] == 2
    assert service.received[0].max_tokens == 3
    assert service.received[0].sampling.seed == 7


def test_an_unknown_context_lists_what_there_is(
    service: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    service.contexts = [_context()]
    assert main(["ask", "--context", "boook", "Who?"]) == 1
    assert "no context 'boook'; there is book" in capsys.readouterr().err


def test_the_servers_refusal_is_printed_and_fails(
    service: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    service.error = ResourceExhausted("64 generations wait already; try again in a second")
    assert main(["ask", "Who?"]) == 1
    assert "64 generations wait already" in capsys.readouterr().err


def test_a_cluster_that_does_not_answer_names_the_way_out(
    service: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--address", "127.0.0.1:1", "--timeout-s", "5"]) == 3
    error = capsys.readouterr().err
    assert "127.0.0.1:1" in error
    assert "longreach up" in error


def test_wrong_sampling_is_wrong_use(service: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "--top-p", "2", "Who?"]) == 2
    assert "top_p is 2.0; it must be in [0, 1]" in capsys.readouterr().err


def test_contexts_are_listed_as_a_table_and_as_json(
    service: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    service.contexts = [_context(state=pb.CONTEXT_STATE_FILLING, prefill_fraction=0.25)]
    assert main(["contexts"]) == 0
    table = capsys.readouterr().out
    assert "ctx-1234abcd" in table
    assert "filling 25%" in table
    assert main(["contexts", "list", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert listed["id"] == "ctx-1234abcd"
    assert listed["tokens"] == 1234


def test_contexts_show_names_shards_and_nodes(
    service: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    shard = common_pb2.Shard(
        shard_id="s0", span=common_pb2.Span(start=0, stop=1234), layers=[0, 1], kv_head_stop=2,
        node_ids=["node-1"],
    )  # fmt: skip
    nodes = [common_pb2.NodeAddress(node_id="node-1", address="h:1")]
    shards = common_pb2.ShardMap(
        shards=[shard], nodes=nodes, policy="layer", reason="layer: 2 nodes"
    )
    service.contexts = [_context(shard_map=shards, index_fraction=0.5, index_kind="flat")]
    assert main(["contexts", "show", "book"]) == 0
    shown = capsys.readouterr().out
    assert "layer: 2 nodes" in shown
    assert "flat, 50% built" in shown
    assert "positions [0, 1234), layers 0, 1, KV heads [0, 2) on node-1" in shown


def test_contexts_delete_tells_what_was_freed(
    service: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    service.contexts = [_context()]
    assert main(["contexts", "delete", "book", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"id": "ctx-1234abcd", "bytes_freed": 77}


def test_contexts_show_needs_a_context(service: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["contexts", "show"]) == 2
    assert "needs an id or a name" in capsys.readouterr().err


def test_status_shows_members_and_load(
    service: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    member = pb.Member(member_id="node-0", kind="node", address="h:1", state="suspect", age_s=3.5)
    service.status = pb.GetStatusResponse(members=[member], models=["demo"], running=2, waiting=5)
    assert main(["status"]) == 0
    shown = capsys.readouterr().out
    assert "suspect" in shown
    assert "2 running, 5 waiting" in shown


@pytest.mark.parametrize("command", ["up", "ingest", "ask", "contexts", "status"])
def test_every_command_teaches_by_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"longreach {command}" in capsys.readouterr().out.partition("examples:")[2]


def test_a_failed_precondition_of_a_delete_is_a_failure_not_wrong_use(
    service: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    service.error = FailedPrecondition("context is being filled; cancel its creation instead")
    assert main(["contexts", "delete", "book"]) == 1
    assert "cancel its creation" in capsys.readouterr().err
