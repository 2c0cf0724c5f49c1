"""Who owns what: tenants, and the names of contexts, which depend on the tenant.

There is one principal for now; every function takes it, so that API keys can bring others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
from collections.abc import Sequence

import numpy as np

from longreach.types import Identity

DEFAULT_PRINCIPAL = "default"


def tenant_digest(secret: bytes, principal: str) -> str:
    """The salt of a tenant, 32 hex digits; only holders of the secret can derive it."""
    return hmac.new(secret, principal.encode(), hashlib.sha256).hexdigest()[:32]


def identity_bytes(identity: Identity) -> bytes:
    """The identity as bytes to hash."""
    return json.dumps(dataclasses.asdict(identity), sort_keys=True).encode()


def context_id(identity: Identity, token_ids: Sequence[int]) -> str:
    """The content-addressed id: equal exactly for equal identity (tenant included) and tokens."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(identity_bytes(identity))
    digest.update(b"\0")
    digest.update(np.asarray(token_ids, "<u4").tobytes())
    return f"ctx-{digest.hexdigest()}"
