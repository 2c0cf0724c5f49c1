"""Whole plans: time per token, what is named as measured, JSON, text, values, the command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from longreach.cli.__main__ import main
from longreach.errors import InvalidRequest
from longreach.planning.accelerators import find_accelerator
from longreach.planning.decode import EXACT_BELOW
from longreach.planning.machine import MachineProfile
from longreach.planning.measure import memory_bandwidth, round_trip
from longreach.planning.plan import Plan, Workload, make_plan
from longreach.planning.report import plan_json, plan_text
from longreach.planning.shapes import load_shape
from longreach.planning.values import plan_values
from longreach.types import Budget
from retrieval_node.index import auto

PROFILE = MachineProfile(50e9, 1e-3, 8, 64 << 30, "test cpu", "2026-01-01T00:00:00+00:00")


def plan_of(
    context: int = 10**6,
    budget: str = "top_k=100",
    profile: MachineProfile | None = None,
    nodes: int = 4,
    cores: int = 16,
    concurrency: int = 1,
) -> Plan:
    work = Workload(
        load_shape("llama-3-8b"), context, concurrency, concurrency, find_accelerator("a100-80g"),
        Budget.parse(budget), nodes=nodes, node_cores=cores, ttft_target_s=20,
    )  # fmt: skip
    return make_plan(work, profile)


def test_time_per_token_adds_up_by_hand() -> None:
    """32 layers, each a 1 ms round trip and 8 heads x 1M keys x (32 + 3% of 512) bytes."""
    decode = plan_of(profile=PROFILE).decode
    assert decode.round_trips_s == pytest.approx(0.032)
    assert decode.search_s == pytest.approx(32 * 8 * 1e6 * (32 + 0.03 * 512) / 50e9)
    assert decode.model_s == pytest.approx(8.03e9 * 2 / (2.039e12 * 0.7), rel=1e-3)
    assert decode.token_s == decode.model_s + decode.round_trips_s + decode.search_s


def test_an_exact_budget_reads_every_row_and_no_codes() -> None:
    decode = plan_of(profile=PROFILE, budget="exact").decode
    assert decode.search_s == pytest.approx(32 * 8 * 1e6 * 512 / 50e9)


def test_short_contexts_are_attended_whole_as_the_nodes_do() -> None:
    assert auto.EXACT_BELOW == EXACT_BELOW
    short = plan_of(context=EXACT_BELOW - 1, profile=PROFILE).decode
    assert short.search_s == pytest.approx(32 * 8 * (EXACT_BELOW - 1) * 512 / 50e9)


def test_head_groups_share_a_layers_reading() -> None:
    """One core a node: four nodes with two heads each read a quarter of a layer."""
    grouped = plan_of(profile=PROFILE, cores=1)
    assert grouped.nodes.policy == "head_group"
    assert grouped.decode.search_s == pytest.approx(plan_of(profile=PROFILE).decode.search_s / 4)


@pytest.mark.parametrize(("profile", "origin"), [(PROFILE, "measured"), (None, "assumed")])
def test_inputs_say_where_they_are_from(profile: MachineProfile | None, origin: str) -> None:
    origins = {each.name: each.origin for each in plan_of(profile=profile).decode.inputs}
    assert origins["node memory bandwidth"] == origins["round trip of a layer"] == origin
    assert re.search(rf"^ +{origin} +node memory", plan_text(plan_of(profile=profile)), re.M)


def test_a_device_that_is_too_small_is_said_to_be() -> None:
    work = Workload(
        load_shape("llama-3-70b"), 10**6, 1, 1, find_accelerator("rtx4090-24g"),
        Budget.parse("top_k=100"), nodes=4,
    )  # fmt: skip
    plan = make_plan(work)
    assert not plan.device_fits
    assert "DOES NOT FIT" in plan_text(plan)
    assert plan_of().device_fits


def test_a_context_beyond_the_models_positions_is_pointed_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for context, noted in (("200K", False), ("300K", True)):
        arguments = ["plan", "--model", "models/demo", "--context", context]
        assert main([*arguments, "--profile", str(tmp_path / "none.json")]) == 0
        assert ("ends at 262,144 positions" in capsys.readouterr().out) is noted


def test_sessions_beyond_a_workers_slots_need_another_worker() -> None:
    assert [plan_of(concurrency=n).workers for n in (1, 16, 17)] == [1, 1, 2]


def test_json_holds_every_figure_and_is_json() -> None:
    plan = json.loads(json.dumps(plan_json(plan_of())))
    assert plan["node"]["contexts"] == 2 * 10**6 * 131072, "two copies"
    assert plan["workload"]["budget"] == "top_k=100"
    assert plan["dense"]["accelerators"] > plan["sparse"]["accelerators"]
    assert [column["tokens"] for column in plan["table1"]] == [128000, 256000, 512000, 1024000]


def test_values_hold_what_the_plan_says() -> None:
    plan = plan_of(concurrency=4)
    values = yaml.safe_load(plan_values(plan))
    assert values["retrievalNode"]["replicas"] == plan.nodes.count
    limit = int(values["retrievalNode"]["resources"]["limits"]["memory"].removesuffix("Mi")) << 20
    assert limit >= plan.nodes.memory_bytes
    assert values["worker"]["config"]["max_sessions"] == 4
    assert Budget.parse(values["coordinator"]["config"]["default_budget"]).top_k == 100


def test_a_profile_survives_the_file_and_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a" / "machine.json"
    PROFILE.save(path)
    assert MachineProfile.load(path) == PROFILE
    for broken in ("[]", "{}", "{", '{"format": "longreach-machine-1"}'):
        path.write_text(broken)
        with pytest.raises(InvalidRequest, match="--measure"):
            MachineProfile.load(path)


def test_measurements_are_of_the_real_machine() -> None:
    """Loopback and memory answer, with times no machine undercuts."""
    assert 1e8 < memory_bandwidth(1, block_bytes=4 << 20) < 1e13
    assert 1e-6 < round_trip(exchanges=20) < 1


def test_the_command_prints_plans_and_refuses_nonsense(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    missing = ["--profile", str(tmp_path / "none.json")]
    assert main(["plan", "--model", "llama-3-8b", "--context", "1M", "--json", *missing]) == 0
    nodes = json.loads(capsys.readouterr().out)["nodes"]
    assert nodes["count"] == nodes["copies"] == 2
    assert main(["plan", "--model", "llama-3-8b", "--nodes", "3", "--values", *missing]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["retrievalNode"]["replicas"] == 3
    for wrong, word in (
        (["--model", "nothing"], "built in"),
        (["--model", "llama-3-8b", "--gpu", "abacus"], "a100-80g"),
        (["--model", "llama-3-8b", "--budget", "much"], "is not a budget"),
        (["--model", "llama-3-8b", "--sparse-density", "2"], "sparse density"),
        (["--model", "llama-3-8b", "--concurrency", "0"], "concurrency is 0"),
        ([], "no model"),
    ):
        assert main(["plan", *wrong, *missing]) == 2
        assert word in capsys.readouterr().err


def test_a_measured_profile_is_kept_and_used(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "machine.json"
    arguments = ["plan", "--measure", "--model", "llama-3-8b", "--profile", str(path)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "measured  node memory bandwidth" in printed
    assert MachineProfile.load(path).cores >= 1
