"""The other end of the planner's loopback measurement: `python -m longreach.planning.echo`.

Answers every message on a stream with as many bytes as a layer's answers take, until it is killed.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from longreach.rpc.channels import server_options

METHOD = "/longreach.planning/Echo"
SERVING = "serving "
ANSWER_BYTES = 32 * (128 + 1) * 4
"""fp32 outputs and log-sum-exps of 32 query heads."""


def unchanged(message: bytes) -> bytes:
    """Messages are raw bytes both ways."""
    return message


def _echo(requests: Iterator[bytes], call: grpc.ServicerContext) -> Iterator[bytes]:
    answer = bytes(ANSWER_BYTES)
    for _ in requests:
        yield answer


def main() -> None:
    """Serves on a free loopback port, named on standard output."""
    server = grpc.server(ThreadPoolExecutor(2), options=server_options())
    service, _, method = METHOD[1:].partition("/")
    handler = grpc.stream_stream_rpc_method_handler(_echo, unchanged, unchanged)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"{SERVING}127.0.0.1:{port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
