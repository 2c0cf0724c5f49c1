"""Closing a session by its id: for sessions whose worker, with their handles, is gone."""

from __future__ import annotations

import time

import pytest
from node_harness import (
    SECRET,
    Sequence,
    make_store,
    open_session,
    put,
    read_capability,
    session_record,
)

from longreach.errors import NotFound, PermissionDenied
from longreach.rpc.retrieval import AsyncNodeClient
from longreach.security import Capability, sign
from longreach.types import SessionInventory
from retrieval_node.server import start_server


@pytest.fixture
def sequence() -> Sequence:
    return Sequence(60)


def close_capability(session_id: str, **changes: object) -> bytes:
    values = {"tenant": "", "context_id": "", "expires_at": time.time() + 60, **changes}
    return sign(Capability("close", session_id=session_id, **values), SECRET)  # type: ignore[arg-type]


def test_a_session_is_closed_by_its_id_where_its_handle_was_lost(sequence):
    store = make_store()
    put(store, sequence, sequence.shard(0, 20))
    handle, _ = open_session(store, sequence, 20)
    open_session(store, sequence, 20, session_id="s2")
    assert store.append(sequence.entry(handle, 20, 24))[1] is None
    held = store.stats().tail_bytes
    assert store.close_session_id("s1", close_capability("s1")) == held
    assert store.inventory()[1] == [SessionInventory("s2", "", 1)]
    with pytest.raises(NotFound):
        store.close_session(handle)
    assert store.close_session_id("s1", close_capability("s1")) == 0


def test_closing_by_id_leaves_what_was_taken_over_since(sequence):
    store = make_store()
    put(store, sequence, sequence.shard(0, 20))
    open_session(store, sequence, 20)
    handle, _ = open_session(store, sequence, 20, epoch=3)
    store.append(sequence.entry(handle, 20, 24, epoch=3))
    assert store.close_session_id("s1", close_capability("s1"), 2) == 0
    assert store.inventory()[1] == [SessionInventory("s1", "", 3)]
    assert store.close_session_id("s1", close_capability("s1"), 3) > 0
    assert store.inventory()[1] == []


def test_closing_by_id_needs_leave_to_close_that_session(sequence):
    store = make_store()
    put(store, sequence, sequence.shard(0, 20))
    open_session(store, sequence, 20)
    record = session_record(20)
    for wrong in (
        close_capability("s2"),
        close_capability("s1", expires_at=1.0),
        read_capability(record),
        close_capability("s1")[:-1] + b"x",
        b"",
    ):
        with pytest.raises(PermissionDenied):
            store.close_session_id("s1", wrong)
    assert store.inventory()[1] == [SessionInventory("s1", "", 1)]


async def test_the_coordinator_s_client_closes_a_session_by_id(sequence):
    store = make_store()
    put(store, sequence, sequence.shard(0, 20))
    open_session(store, sequence, 20)
    server, address, _ = start_server(store, "127.0.0.1:0", 8)
    client = AsyncNodeClient(address)
    with pytest.raises(PermissionDenied):
        await client.close_session("s1", b"no leave")
    assert await client.close_session("s1", close_capability("s1")) == 0
    assert (await client.inventory())[1] == []
    await client.close()
    server.stop(None).wait()
