"""A plan for reading, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from longreach.planning.plan import Plan
from longreach.planning.prefill import PrefillEstimate
from longreach.planning.quantities import Input, bytes_text, seconds_text
from longreach.planning.table1 import Table1Column


def plan_text(plan: Plan) -> str:
    """The plan in paragraphs: bytes of each tier, nodes, prefill, decode, Table 1, assumptions."""
    sections = (_workload, _tiers, _nodes, _prefill, _decode, _table1, _inputs)
    return "\n\n".join("\n".join(section(plan)) for section in sections)


def plan_json(plan: Plan) -> dict[str, Any]:
    """Every figure of the plan, in bytes and seconds; names are the dataclasses' own."""
    shape = plan.workload.shape
    everything = dataclasses.asdict(plan)
    everything["workload"]["budget"] = str(plan.workload.budget)
    everything["workload"]["shape"] = {
        "name": shape.name,
        "parameters": shape.parameters,
        "layers": len(shape.layers),
        "searched_layers": len(shape.searched),
        "dtype": shape.dtype,
        "kv_bytes_per_token": shape.token_bytes,
    }
    everything["device"]["total"] = plan.device.total
    everything["disk_bytes"] = plan.disk_bytes
    everything["dense"]["total_s"] = plan.dense.total_s
    everything["sparse"]["total_s"] = plan.sparse.total_s
    everything["decode"]["token_s"] = plan.decode.token_s
    return everything


def _workload(plan: Plan) -> Iterator[str]:
    work, shape = plan.workload, plan.workload.shape
    yield (
        f"{shape.name}: {shape.parameters / 1e6:,.1f} million parameters in {shape.dtype}, "
        f"{len(shape.layers)} layers ({len(shape.searched)} searched), "
        f"{bytes_text(shape.token_bytes)} of KV per token"
    )
    yield (
        f"{work.contexts} context(s) of {work.context:,} tokens, {work.concurrency} session(s) at "
        f"a time, budget {work.budget}, {work.accelerator.name}"
    )
    if 0 < shape.max_positions < work.context:
        yield f"NOTE: the model's configuration ends at {shape.max_positions:,} positions"


def _tiers(plan: Plan) -> Iterator[str]:
    device, node, step = plan.device, plan.node, plan.step
    yield "bytes"
    yield from _rows(
        ("device, each worker", device.total, ""),
        ("  weights", device.weights, ""),
        ("  resident KV", device.resident_kv,
         f"a full KV cache of these sessions: {bytes_text(device.full_kv)}"),
        ("  prefill, hidden states and one layer", device.prefill, "while a prompt is stored"),
        ("nodes' memory, all nodes", node.room, "what must be free to be admitted"),
        ("  K and V", node.contexts, f"{plan.nodes.copies} copies"),
        ("  indexes (sketch)", node.indexes, "25% of K and V is kept free for them"),
        ("  tails of sessions", node.tails, f"{plan.workload.tail_tokens} tokens each"),
        ("nodes' disks, all nodes", plan.disk_bytes, "snapshots"),
        ("network, each token", step.queries + step.answers + step.append,
         f"{bytes_text(step.queries)} of queries, {bytes_text(step.answers)} of answers"),
    )  # fmt: skip
    accelerator = plan.workload.accelerator
    verdict = "fits" if plan.device_fits else "DOES NOT FIT"
    yield (
        f"  {plan.workers} worker(s); {verdict} 90% of {accelerator.name}'s "
        f"{bytes_text(accelerator.memory_bytes)}"
    )


def _rows(*rows: tuple[str, int, str]) -> Iterator[str]:
    for name, nbytes, note in rows:
        yield f"  {name:<40}{bytes_text(nbytes):>12}  {note}".rstrip()


def _nodes(plan: Plan) -> Iterator[str]:
    nodes = plan.nodes
    yield (
        f"nodes: {nodes.count} of {bytes_text(nodes.memory_bytes)} and {nodes.cores} cores, "
        f"{nodes.copies} copies, placement {nodes.policy}"
    )
    yield f"  why: {nodes.why}"


def _prefill(plan: Plan) -> Iterator[str]:
    yield f"prefill of {plan.workload.context:,} tokens on one {plan.workload.accelerator.name}"
    for name, cost in (("dense", plan.dense), ("sparse", plan.sparse)):
        yield from _prefill_lines(name, cost, plan.workload.ttft_target_s)


def _prefill_lines(name: str, cost: PrefillEstimate, target_s: float) -> Iterator[str]:
    flops = cost.flops
    yield (
        f"  {name:<7}{flops.total:.3g} FLOPs ({flops.linear:.3g} linear, {flops.attention:.3g} "
        f"attention at density {cost.density:g}, {flops.softmax:.3g} softmax)"
    )
    yield (
        f"         time to first token {seconds_text(cost.total_s)} at Table 1's utilisation; "
        f"{seconds_text(cost.at_peak_s)} at peak, x1.5 = {seconds_text(cost.slides_s)}"
    )
    if cost.accelerators:
        yield (
            f"         {cost.accelerators} accelerators' worth of compute for "
            f"{seconds_text(target_s)}, if it could be spread without loss"
        )


def _decode(plan: Plan) -> Iterator[str]:
    decode = plan.decode
    yield (
        f"expected time per token: {seconds_text(decode.token_s)} = model "
        f"{seconds_text(decode.model_s)} + round trips {seconds_text(decode.round_trips_s)} + "
        f"search {seconds_text(decode.search_s)}"
    )


def _table1(plan: Plan) -> Iterator[str]:
    yield (
        f"full attention, {plan.workload.shape.name} on one {plan.workload.accelerator.name} "
        "(RetrievalAttention, Table 1; seconds without a KV cache)"
    )
    yield from table1_lines(plan.table1)


def table1_lines(columns: tuple[Table1Column, ...]) -> Iterator[str]:
    """The table's rows, as published."""
    yield _cells("prompt", *(f"{each.tokens // 1000:,}K" for each in columns))
    yield _cells("total latency (s)", *(f"{each.total_s:,.1f}" for each in columns))
    yield _cells("FFN (s)", *(f"{each.ffn_s:,.1f}" for each in columns))
    yield _cells("attention (s)", *(f"{each.attention_s:,.1f}" for each in columns))
    yield _cells("KV cache (GiB)", *(f"{each.kv_cache_gib:,.1f}" for each in columns))


def _cells(name: str, *cells: str) -> str:
    return f"  {name:<20}" + "".join(f"{cell:>10}" for cell in cells)


def _inputs(plan: Plan) -> Iterator[str]:
    """What was measured and what was not."""
    yield "what the estimates rest on"
    work = plan.workload
    others = (
        Input("accelerator", work.accelerator.flops / 1e12, "TFLOP/s", "published", "data sheet"),
        Input("utilisation", 0, "", "published", "fitted to RetrievalAttention's Table 1"),
        Input("sparse prefill's density", work.sparse_density, "", "assumed", "--sparse-density"),
    )
    for each in (*plan.decode.inputs, *others):
        number = f" {each.value:.4g} {each.unit}".rstrip() if each.value else ""
        note = f" ({each.note})" if each.note else ""
        yield f"  {each.origin:<10}{each.name}{number}{note}"
