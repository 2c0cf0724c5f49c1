"""The dashboard `quality`: whether retrieval finds what full attention would use, at what cost."""

from __future__ import annotations

from dashboard_panels import (
    RATE,
    RELEASE,
    Dashboard,
    Panel,
    Query,
    Row,
    mean,
    quantile,
    rate,
    total,
)


def _work(title: str, histogram: str, description: str) -> Panel:
    return Panel(
        title,
        description,
        "percentunit",
        [
            Query(mean(histogram, where=RELEASE), "mean"),
            Query(quantile(0.95, histogram), "p95"),
        ],
    )


def _sampled(title: str, histogram: str, description: str, tail: float) -> Panel:
    worst = f"{{{{index_kind}}}} p{tail * 100:.0f}"
    return Panel(
        title,
        description,
        "percentunit",
        [
            Query(mean(histogram, "index_kind"), "{{index_kind}} mean"),
            Query(quantile(tail, histogram, "index_kind"), worst),
        ],
    )


QUALITY = Dashboard(
    uid="longreach-quality",
    title="longreach / retrieval quality",
    description="Whether retrieval finds what full attention would use, and what it reads for it.",
    rows=[
        Row(
            "Sampled against exact attention",
            [
                _sampled(
                    "Recall",
                    "retrieval_recall_sampled",
                    "Of the keys that an exact search takes, the share that retrieval took too. "
                    "p5: the worst twentieth.",
                    0.05,
                ),
                _sampled(
                    "Attention mass",
                    "retrieval_mass_sampled",
                    "Share of the full softmax's weight that lies on the keys that were used.",
                    0.05,
                ),
                _sampled(
                    "Output error",
                    "retrieval_output_error_sampled",
                    "Distance of the output from that of exact attention, relative to its length.",
                    0.95,
                ),
                Panel(
                    "Recall, distribution",
                    "How many samples fell into each range.",
                    "percentunit",
                    [
                        Query(
                            "sum by (le) (increase(longreach:retrieval_recall_sampled_bucket"
                            f"{{{RELEASE}}}{RATE}))",
                            "{{le}}",
                        )
                    ],
                    kind="heatmap",
                ),
                Panel(
                    "Samples",
                    "Done, or dropped: sampling takes at most 2% of a core. Few samples make "
                    "the figures above uncertain.",
                    "ops",
                    [Query(rate("retrieval_quality_samples", "result"), "{{result}}")],
                    stacked=True,
                ),
                Panel(
                    "Coverage",
                    "Share of positions whose shard answered, in the worst step of a request: 1, "
                    "unless the caller allowed less.",
                    "percentunit",
                    [
                        Query(mean("kv_coverage_ratio"), "mean"),
                        Query(quantile(0.01, "kv_coverage_ratio"), "p1"),
                    ],
                ),
            ],
        ),
        Row(
            "Work of retrieval",
            [
                _work(
                    "Scan fraction",
                    "retrieval_scan_fraction",
                    "Keys whose full-precision row was read, of the keys in scope.",
                ),
                _work(
                    "Attended fraction",
                    "retrieval_attended_fraction",
                    "Keys in the softmax, of the keys in scope.",
                ),
                _work(
                    "Bytes fraction",
                    "retrieval_bytes_fraction",
                    "Bytes read, of the bytes of K and V in scope.",
                ),
                Panel(
                    "Indexed share",
                    "Where it is below 1 shards are scanned exactly: recall rises, and so does the "
                    "scan fraction.",
                    "percentunit",
                    [Query(total("index_fraction", "engine"), "{{engine}}")],
                    maximum=1,
                ),
            ],
        ),
    ],
)
