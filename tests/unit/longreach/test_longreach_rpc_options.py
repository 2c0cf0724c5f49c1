"""gRPC ignores options it does not know; a misspelt one would only show as broken connections."""

from __future__ import annotations

from pathlib import Path

import pytest
from grpc._cython import cygrpc

from longreach.rpc.channels import channel_options, server_options

LIBRARY = Path(cygrpc.__file__).read_bytes()
NAMES = sorted({name for name, _ in server_options() + channel_options(own_connection=True)})


@pytest.mark.parametrize("name", NAMES)
def test_the_installed_grpc_knows_the_option(name: str) -> None:
    assert name.encode() + b"\0" in LIBRARY
