"""Capabilities: only holders of the secret can make one, and it allows one thing."""

import dataclasses
import hashlib
import hmac

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longreach.errors import PermissionDenied
from longreach.security import Capability, sign, verify

SECRET = b"cluster secret"
WRITE = Capability("write", "tenant", "ctx-1", expires_at=1000.0)
READ = Capability("read", "tenant", "ctx-1", 1000.0, session_id="s-1", epoch=4)


def check(token, *, secret=SECRET, now=999.0, action="write", context_id="ctx-1", session_id=""):
    return verify(
        token, secret, now=now, action=action, context_id=context_id, session_id=session_id
    )


def test_a_signed_capability_is_read_back_whole():
    assert check(sign(WRITE, SECRET)) == WRITE
    assert check(sign(READ, SECRET), action="read", session_id="s-1") == READ


def test_another_secret_does_not_verify():
    with pytest.raises(PermissionDenied, match="LONGREACH_CLUSTER_SECRET") as caught:
        check(sign(WRITE, SECRET), secret=b"another")
    assert caught.value.reason == "BAD_CAPABILITY"


@settings(deadline=None)
@given(data=st.data())
def test_no_changed_byte_is_accepted(data):
    token = bytearray(sign(READ, SECRET))
    at = data.draw(st.integers(0, len(token) - 1))
    token[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(PermissionDenied) as caught:
        check(bytes(token), action="read", session_id="s-1")
    assert caught.value.reason == "BAD_CAPABILITY"


@given(token=st.binary(max_size=200))
def test_no_made_up_bytes_are_accepted(token):
    with pytest.raises(PermissionDenied):
        check(token)


def test_an_empty_payload_is_refused_even_with_its_right_tag():

    with pytest.raises(PermissionDenied):
        check(hmac.new(SECRET, b"", hashlib.sha256).digest())


def test_an_expired_capability_is_refused():
    with pytest.raises(PermissionDenied, match="expired 5 s ago") as caught:
        check(sign(WRITE, SECRET), now=1005.0)
    assert caught.value.reason == "CAPABILITY_EXPIRED"


@pytest.mark.parametrize(
    "asked",
    [
        {"action": "write", "session_id": "s-1"},
        {"action": "read", "session_id": "s-2"},
        {"action": "read", "session_id": ""},
        {"action": "read", "session_id": "s-1", "context_id": "ctx-2"},
    ],
)
def test_a_capability_does_not_allow_anything_else(asked):
    with pytest.raises(PermissionDenied) as caught:
        check(sign(READ, SECRET), **asked)
    assert caught.value.reason == "CAPABILITY_FOR_OTHER"


def test_tokens_of_different_capabilities_differ_in_every_field():
    tokens = {
        sign(dataclasses.replace(READ, **change), SECRET)
        for change in (
            {},
            {"action": "write"},
            {"tenant": "other"},
            {"context_id": "ctx-2"},
            {"expires_at": 1001.0},
            {"session_id": "s-2"},
            {"epoch": 5},
        )
    }
    assert len(tokens) == 7
