"""Benchmark reports: the same JSON from every benchmark, and tables for people."""

import io
import json

from rich.console import Console

from benchmarks.report import Report, argument_parser, commit, machine, print_report


def example() -> Report:
    report = Report("example", config={"keys": 1000}, quick=True)
    report.add(method="ours", token_ms=1.25, nodes=2)
    report.add(method="peer", token_ms=2.5)
    report.at_most("time of a token", 2.0, 2.0, "ms")
    report.at_least("speed-up", 3.0, 2.0, "x", note="noisy machine")
    report.skip("GPU rows", "no GPU here")
    return report


def test_the_json_has_every_part_a_reader_needs(tmp_path):
    path = tmp_path / "new" / "example.json"
    example().finish(path)
    written = json.loads(path.read_text())
    assert list(written) == [
        "benchmark",
        "quick",
        "machine",
        "commit",
        "config",
        "results",
        "targets",
        "skipped",
    ]
    assert written["results"][0] == {"method": "ours", "token_ms": 1.25, "nodes": 2}
    assert written["skipped"] == [{"what": "GPU rows", "why": "no GPU here"}]


def test_a_limit_is_met_when_it_is_reached_exactly_and_missed_beyond():
    most, least = example().targets
    assert (most.target, most.met) == ("<= 2", True)
    assert (least.target, least.met, least.note) == (">= 3", False, "noisy machine")
    report = Report("example", config={})
    report.at_most("a", 2.0, 2.001, "ms")
    report.at_least("b", 3.0, 3.0, "x")
    assert [target.met for target in report.targets] == [False, True]


def test_the_machine_is_described_by_what_figures_depend_on():
    described = machine()
    assert described["cores"] >= 1
    assert described["memory_bytes"] > 1 << 28
    assert described["python"].count(".") == 2
    assert described["versions"]["numpy"]
    json.dumps(described)


def test_the_commit_is_a_short_hash_or_nothing():
    found = commit()
    assert found is None or len(found.rstrip("+")) >= 7


def test_tables_show_rows_targets_and_what_was_skipped():
    console = Console(width=120, record=True, file=io.StringIO())
    print_report(example(), console)
    text = console.export_text()
    for expected in ("token_ms", "1.25", "peer", "<= 2 ms", "NO", "noisy machine", "no GPU here"):
        assert expected in text


def test_every_benchmark_takes_quick_and_json(tmp_path):
    parser = argument_parser("example", "Measures nothing.")
    arguments = parser.parse_args(["--quick", "--json", str(tmp_path / "x.json")])
    assert arguments.quick is True
    assert arguments.json == tmp_path / "x.json"
    assert parser.parse_args([]).json is None
