"""The dashboard `users`: latency of tokens, goodput, errors and queue, as users feel them."""

from __future__ import annotations

from dashboard_panels import (
    MODEL,
    RATE,
    Dashboard,
    Panel,
    Query,
    Row,
    mean,
    percentiles,
    quantile,
    rate,
    stat,
    total,
)

USERS = Dashboard(
    uid="longreach-users",
    title="longreach / users",
    description="What users feel: latency of tokens, goodput, errors, queue.",
    by_model=True,
    rows=[
        Row(
            "Now",
            [
                stat(
                    "Running",
                    "Requests that workers decode or prefill for.",
                    "short",
                    total("num_requests_running", where=MODEL),
                ),
                stat(
                    "Waiting",
                    "Requests that wait for a worker, of all models; at most `--max-waiting`.",
                    "short",
                    total("num_requests_waiting"),
                ),
                stat(
                    "Goodput",
                    "Share of the finished requests within the objectives of time to first token "
                    "and of mean time between tokens.",
                    "percentunit",
                    f"{rate('requests_within_objectives', where=MODEL)} / "
                    f"{rate('request_success', where=MODEL)}",
                    alarm=0.9,
                    alarm_below=True,
                ),
                stat(
                    "Failures",
                    "Failed requests a second, wrong ones among them.",
                    "reqps",
                    f"{rate('request_failure')} or vector(0)",
                ),
                stat(
                    "First token, p95",
                    "95th percentile of the time to first token.",
                    "s",
                    quantile(0.95, "time_to_first_token_seconds", where=MODEL),
                ),
                stat(
                    "Between tokens, p95",
                    "95th percentile of the time between two tokens.",
                    "s",
                    quantile(0.95, "inter_token_latency_seconds", where=MODEL),
                ),
            ],
        ),
        Row(
            "Latency",
            [
                Panel(
                    "Time to first token",
                    "From the request's arrival to its first token: queue, prefill of what is not "
                    "stored, the question, one step.",
                    "s",
                    percentiles(
                        "time_to_first_token_seconds", "model_name", "{{model_name}}", MODEL
                    ),
                ),
                Panel(
                    "Time between tokens",
                    "Of one request. It grows with the batch, with the bytes that nodes read for a "
                    "layer, and with prefills that share the worker.",
                    "s",
                    percentiles(
                        "inter_token_latency_seconds", "model_name", "{{model_name}}", MODEL
                    ),
                ),
                Panel(
                    "Whole request",
                    "From arrival to the last token; compare it with the tokens asked for.",
                    "s",
                    percentiles(
                        "e2e_request_latency_seconds", "model_name", "{{model_name}}", MODEL
                    ),
                ),
                Panel(
                    "Where the time goes",
                    "Mean seconds of a request in the queue, in prefill and in decoding.",
                    "s",
                    [
                        Query(mean("request_queue_time_seconds", where=MODEL), "queue"),
                        Query(mean("request_prefill_time_seconds", where=MODEL), "prefill"),
                        Query(mean("request_decode_time_seconds", where=MODEL), "decode"),
                    ],
                    stacked=True,
                ),
                Panel(
                    "Time in the queue",
                    "Seconds that requests waited for a worker's session.",
                    "s",
                    percentiles("request_queue_time_seconds", "", "", MODEL),
                ),
                Panel(
                    "Time to first token, distribution",
                    "How many requests fell into each range: two bands tell hits from misses of "
                    "stored contexts.",
                    "s",
                    [
                        Query(
                            "sum by (le) (increase(longreach:time_to_first_token_seconds_bucket"
                            f"{{{MODEL}}}{RATE}))",
                            "{{le}}",
                        )
                    ],
                    kind="heatmap",
                ),
            ],
        ),
        Row(
            "Load and errors",
            [
                Panel(
                    "Finished requests",
                    "By the reason they ended: stop, length.",
                    "reqps",
                    [
                        Query(
                            rate("request_success", "finished_reason", MODEL),
                            "{{finished_reason}}",
                        )
                    ],
                    stacked=True,
                ),
                Panel(
                    "Failed requests",
                    "By gRPC status. RESOURCE_EXHAUSTED is a full queue or full nodes, UNAVAILABLE "
                    "a lost member, INVALID_ARGUMENT the client's own.",
                    "reqps",
                    [Query(rate("request_failure", "code"), "{{code}}")],
                    stacked=True,
                ),
                Panel(
                    "Goodput",
                    "Share of finished requests within the objectives, and how many those are.",
                    "percentunit",
                    [
                        Query(
                            f"{rate('requests_within_objectives', 'model_name', MODEL)} / "
                            f"{rate('request_success', 'model_name', MODEL)}",
                            "{{model_name}}",
                        )
                    ],
                    maximum=1,
                ),
                Panel(
                    "Running and waiting",
                    "Requests in decoding or prefill, and in the queue.",
                    "short",
                    [
                        Query(total("num_requests_running", where=MODEL), "running"),
                        Query(total("num_requests_waiting"), "waiting"),
                    ],
                ),
                Panel(
                    "Tokens",
                    "Prompt tokens taken and tokens generated, a second.",
                    "short",
                    [
                        Query(rate("prompt_tokens", where=MODEL), "prompt"),
                        Query(rate("generation_tokens", where=MODEL), "generated"),
                    ],
                ),
                Panel(
                    "Prompt tokens found stored",
                    "Share of prompt tokens that a stored context served, named by the request or "
                    "found by its prefix.",
                    "percentunit",
                    [
                        Query(
                            f"{rate('prefix_cache_hits', where=MODEL)} / "
                            f"{rate('prefix_cache_queries', where=MODEL)}",
                            "hits",
                        )
                    ],
                    maximum=1,
                ),
            ],
        ),
    ],
)
