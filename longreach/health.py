"""Asks a service for its health: `python -m longreach.health HOST:PORT [SERVICE]`.

For containers' health checks and scripts; needs nothing but the image itself. Without SERVICE it
asks whether the process lives; with a service's full name, for example
longreach.v1.GenerationService, whether it takes work. Exit status 0: SERVING; 1: another status or
no answer, which is printed; 2: wrong use.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from longreach.rpc.channels import sync_channel

SERVING = "SERVING"


def health_of(address: str, service: str = "", timeout_s: float = 3.0) -> str:
    """The status there: "SERVING", "NOT_SERVING", or why there was no answer, such as
    "UNAVAILABLE" or "NOT_FOUND" for a service that the server does not have."""
    with sync_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the status; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m longreach.health", description=__doc__)
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("service", nargs="?", default="", help="full name; empty for liveness")
    parser.add_argument("--timeout-s", type=float, default=3.0, metavar="S")
    arguments = parser.parse_args(argv)
    status = health_of(arguments.address, arguments.service, arguments.timeout_s)
    print(status)
    return 0 if status == SERVING else 1


if __name__ == "__main__":
    sys.exit(main())
