"""The RPC waterfall: real processes answer, and its rows add up."""

from contextlib import ExitStack

import pytest

from benchmarks import rpc
from benchmarks.report import Report


def stages(total, **rest):
    return {**dict.fromkeys(rpc.STAGES, 0.0), **rest, "total": total}


def test_rows_are_medians_per_layer_with_the_ratio_to_the_floor():
    measured = {}
    for nodes in rpc.NODE_COUNTS:
        measured["stream, polling", nodes] = [
            stages(total, send=320.0) for total in (9_600.0, 6_400.0, 3_200.0)
        ]
        measured["plain TCP", nodes] = [{"total": 640.0}, {"total": 640.0}]
    report = Report("rpc", config={})
    rpc.report_on(measured, report)
    row = report.results[0]
    assert (row["nodes"], row["token_ms"], row["layer_us"], row["send_us"]) == (1, 6.4, 200, 10)
    assert row["floor_ratio"] == 10
    assert "send_us" not in report.results[1]
    assert (report.targets[0].measured, report.targets[0].met) == (6.4, True)


@pytest.mark.parametrize("transport", rpc.TRANSPORTS)
def test_every_transport_answers_over_real_processes(transport):

    with ExitStack() as stack:
        client = rpc.start_transport(stack, transport)
        for nodes in (1, 2):
            (token,) = rpc.measure(client, nodes, 1)
            parts = [token[stage] for stage in rpc.STAGES if stage in token]
            assert token["total"] > 0
            assert not parts or sum(parts) == pytest.approx(token["total"], rel=0.01)
