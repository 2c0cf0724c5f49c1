"""Starts a retrieval node whose Attend replies can be damaged: `python -m ...faulty_node`.

The product's own node in everything else. While the file FAULTS/NODE.damage exists (FAULTS is the
environment's LONGREACH_FAULTS), a bit of the numbers is flipped in every reply after the node has
made it: what memory or a network card without a fault detector would do. TLS cannot notice.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longreach.v1 import retrieval_pb2 as pb
from retrieval_node.__main__ import main
from retrieval_node.server import RetrievalServer

_FAULTS = "LONGREACH_FAULTS"
# The exponent of a float32, little endian: the number becomes another one by powers of two.
_BYTE, _BIT = 3, 0x08


def damaged(reply: pb.AttendResponse) -> pb.AttendResponse:
    """The reply with one bit of its first output flipped; replies without outputs as they are."""
    data = bytearray(reply.outputs.data)
    if len(data) > _BYTE:
        data[_BYTE] ^= _BIT
        reply.outputs.data = bytes(data)
    return reply


def install(switch: Path) -> None:
    """Makes this process's node damage its replies while the switch exists."""
    sound = RetrievalServer.Attend

    def attend(self: RetrievalServer, requests: Any, context: Any) -> Iterator[pb.AttendResponse]:
        for reply in sound(self, requests, context):
            yield damaged(reply) if switch.exists() else reply

    RetrievalServer.Attend = attend  # type: ignore[method-assign]


def _node_id(arguments: list[str]) -> str:
    return arguments[arguments.index("--node-id") + 1]


if __name__ == "__main__":
    install(Path(os.environ[_FAULTS]) / f"{_node_id(sys.argv)}.damage")
    sys.exit(main())
