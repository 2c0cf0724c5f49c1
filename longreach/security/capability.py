"""Capabilities: what the coordinator lets a worker do on a node, signed with the cluster's secret.

A capability is `payload || HMAC-SHA256(secret, payload)` where the payload is compact JSON. Nodes
and workers verify it without asking anybody. Rows then name only the handle that the node gave for
it, so nothing in a row can name another tenant's data.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import asdict, dataclass
from typing import Literal

from longreach.errors import PermissionDenied

_TAG_BYTES = 32
Action = Literal["read", "write", "place", "close"]


@dataclass(frozen=True, slots=True)
class Capability:
    """Leave to `read` (open a session on) or `write` (put, seal, drop) a context, to `place` it
    (copy its shards from node to node, drop some of them), or to `close` a session by its id.

    `expires_at` is in Unix seconds; `epoch` is that of the session to read, of the shard map to
    place by, else 0; `session_id` is "" but to read and to close. To close, only `session_id`
    counts: who closes what a crash left open knows no more.
    """

    action: Action
    tenant: str
    context_id: str
    expires_at: float
    session_id: str = ""
    epoch: int = 0


def sign(capability: Capability, secret: bytes) -> bytes:
    """The capability as bytes that only holders of the secret can make."""
    payload = json.dumps(asdict(capability), sort_keys=True, separators=(",", ":")).encode()
    return payload + hmac.new(secret, payload, hashlib.sha256).digest()


def verify(
    token: bytes,
    secret: bytes,
    *,
    now: float,
    action: Action,
    context_id: str,
    session_id: str = "",
) -> Capability:
    """The capability in `token`; raises PermissionDenied unless it allows this, now."""
    payload, tag = token[:-_TAG_BYTES], token[-_TAG_BYTES:]
    expected = hmac.new(secret, payload, hashlib.sha256).digest()
    if len(token) <= _TAG_BYTES or not hmac.compare_digest(tag, expected):
        raise PermissionDenied(
            "the capability is not signed with this cluster's secret; check that every service "
            "has the same LONGREACH_CLUSTER_SECRET",
            reason="BAD_CAPABILITY",
        )
    capability = Capability(**json.loads(payload))
    if capability.expires_at < now:
        raise PermissionDenied(
            f"the capability expired {now - capability.expires_at:.0f} s ago; open the session "
            "again, and check that the machines' clocks agree",
            reason="CAPABILITY_EXPIRED",
        )
    allowed = (capability.action, capability.context_id, capability.session_id)
    if allowed != (action, context_id, session_id):
        raise PermissionDenied(
            f"the capability allows {allowed}, not {(action, context_id, session_id)}",
            reason="CAPABILITY_FOR_OTHER",
        )
    return capability
