"""The shared catalog: Redis or Valkey, for several coordinators at once.

Every change is one Lua script, so that comparing and setting cannot be interleaved. All keys share
one hash tag and work on a Redis cluster too:

    longreach:{NAMESPACE}:records    hash   context id -> record, JSON
                         :tokens     hash   context id -> token ids, little-endian uint32
                         :revisions  zset   context id (stored or removed) by revision
                         :removals   hash   context id -> Unix seconds of its removal
                         :nodes      hash   node id -> host:port
                         :revision   counter of changes
                         :generation random; made with the first key, so it tells lost data
                         :leader, :epoch    the lease (expires by itself) and its fencing epoch
                         :present    zset   coordinator by Unix milliseconds of its last report

What is stored is soft state: losing it loses names and prefix lookup at most, the rest comes back
from the coordinators' memory and the nodes' inventories. Nothing rests on the lease being exclusive
but the economy of not doing things twice.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from redis import asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from coordinator.catalog.base import (
    TOMBSTONE_TTL_S,
    Beat,
    Catalog,
    Conflict,
    ContextRecord,
    Lease,
)
from coordinator.catalog.record_json import record_from_json, record_to_json
from longreach.errors import InvalidRequest, Unavailable

LEASE_TTL_S = 5.0
"""A leader that does not report for this long is replaced."""
PRESENT_S = 10.0
"""A coordinator that did not report for this long counts as gone."""
TIMEOUT_S = 2.0
RETRY_AFTER_S = 5.0

_KEYS = (
    "records", "tokens", "revisions", "removals", "nodes", "revision", "generation", "leader",
    "epoch", "present",
)  # fmt: skip
_NAMES = "local " + ", ".join(_KEYS) + " = unpack(KEYS)\n"
_FENCE = """
local fence = tonumber(ARGV[1])
local leading = tonumber(redis.call('GET', epoch) or 0)
if fence > 0 and fence < leading then return {'fenced', leading} end
"""
_PUT = f"""{_NAMES}{_FENCE}
local id, record, expected, with_tokens = ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local stored = 0
if redis.call('HEXISTS', records, id) == 1 then
    stored = tonumber(redis.call('ZSCORE', revisions, id))
end
if expected >= 0 and expected ~= stored then return {{'conflict', stored}} end
redis.call('SET', generation, ARGV[7], 'NX')
local number = redis.call('INCR', revision)
redis.call('HSET', records, id, record)
redis.call('ZADD', revisions, number, id)
redis.call('HDEL', removals, id)
if with_tokens == '1' then redis.call('HSET', tokens, id, ARGV[6])
elseif stored == 0 then redis.call('HDEL', tokens, id) end
return {{'ok', number}}
"""
_REMOVE = f"""{_NAMES}
redis.call('SET', generation, ARGV[3], 'NX')
redis.call('HDEL', records, ARGV[1])
redis.call('HDEL', tokens, ARGV[1])
redis.call('HSET', removals, ARGV[1], ARGV[2])
redis.call('ZADD', revisions, redis.call('INCR', revision), ARGV[1])
"""
_TOMBSTONES = f"""{_NAMES}
local kept = {{}}
local all = redis.call('HGETALL', removals)
for i = 1, #all, 2 do
    if tonumber(all[i + 1]) >= tonumber(ARGV[1]) then kept[#kept + 1] = all[i]
    else
        redis.call('HDEL', removals, all[i])
        redis.call('ZREM', revisions, all[i])
    end
end
return kept
"""
_PUT_NODES = f"""{_NAMES}{_FENCE}
redis.call('DEL', nodes)
for i = 2, #ARGV, 2 do redis.call('HSET', nodes, ARGV[i], ARGV[i + 1]) end
return {{'ok', 0}}
"""
_BEAT = f"""{_NAMES}
local me, since, known, ttl_ms = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local now = redis.call('TIME')
local now_ms = tonumber(now[1]) * 1000 + math.floor(tonumber(now[2]) / 1000)
redis.call('SET', generation, ARGV[6], 'NX')
redis.call('ZADD', present, now_ms, me)
redis.call('ZREMRANGEBYSCORE', present, '-inf', now_ms - tonumber(ARGV[5]))
local number = tonumber(redis.call('GET', epoch) or 0)
local holder = redis.call('GET', leader)
if ARGV[7] ~= '' then
    holder = ''
    number = math.max(number, tonumber(ARGV[7]))
    redis.call('SET', epoch, number)
    redis.call('DEL', leader)
elseif holder == me and number >= known then
    redis.call('PEXPIRE', leader, ttl_ms)
elseif not holder or holder == me then
    number = math.max(number, known) + 1
    holder = me
    redis.call('SET', epoch, number)
    redis.call('SET', leader, me, 'PX', ttl_ms)
end
local changed, removed = {{}}, {{}}
local ids = redis.call('ZRANGEBYSCORE', revisions, '(' .. since, '+inf', 'WITHSCORES')
for i = 1, #ids, 2 do
    local record = redis.call('HGET', records, ids[i])
    if record then
        changed[#changed + 1] = record
        changed[#changed + 1] = tonumber(ids[i + 1])
    else
        removed[#removed + 1] = ids[i]
        removed[#removed + 1] = tonumber(ids[i + 1])
    end
end
return {{
    holder, number, redis.call('GET', generation), tonumber(redis.call('GET', revision) or 0),
    redis.call('ZRANGE', present, 0, -1), changed, removed,
}}
"""


class RedisCatalog(Catalog):
    """A catalog at `url` (redis:// or rediss://), apart from others by its `namespace`.

    Calls take TIMEOUT_S at most and are not repeated: whoever needs Redis tries again by itself.
    """

    def __init__(self, url: str, namespace: str, clock: Callable[[], float] = time.time) -> None:
        self._place = _place(url)
        self._clock = clock
        self._generation = secrets.token_hex(8)
        try:
            self._redis = aioredis.Redis.from_url(
                url,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),
            )
        except (ValueError, TypeError) as problem:
            raise InvalidRequest(
                f"catalog {self._place}: {problem}; write redis://HOST:PORT/DB or rediss://..."
            ) from None
        self._keys = [f"longreach:{{{namespace}}}:{name}" for name in _KEYS]
        self._key = dict(zip(_KEYS, self._keys, strict=True))
        self._scripts = {
            text: self._redis.register_script(text)
            for text in (_PUT, _REMOVE, _TOMBSTONES, _PUT_NODES, _BEAT)
        }

    async def put(
        self,
        record: ContextRecord,
        token_ids: Sequence[int] | None = None,
        *,
        expected: int | None = None,
        epoch: int = 0,
    ) -> int:
        """Stores a record (see Catalog.put)."""
        ids = b"" if token_ids is None else np.asarray(token_ids, "<u4").tobytes()
        answer, number = await self._run(
            _PUT,
            epoch,
            record.context_id,
            record_to_json(record),
            -1 if expected is None else expected,
            0 if token_ids is None else 1,
            ids,
            self._generation,
        )
        if answer == b"conflict":
            raise Conflict(
                f"context {record.context_id} has revision {number}, not {expected}: another "
                "coordinator changed it; ask again"
            )
        self._check_fence(answer, epoch, number)
        return int(number)

    async def get(self, context_id: str) -> ContextRecord | None:
        """The record, or None."""
        text = await self._ask(self._redis.hget(self._key["records"], context_id))
        return None if text is None else record_from_json(text.decode())

    async def token_ids(self, context_id: str) -> tuple[int, ...] | None:
        """The context's tokens, or None."""
        ids = await self._ask(self._redis.hget(self._key["tokens"], context_id))
        return None if ids is None else tuple(np.frombuffer(ids, "<u4").tolist())

    async def records(self) -> list[ContextRecord]:
        """Every record, newest first."""
        texts = await self._ask(self._redis.hvals(self._key["records"]))
        found = [record_from_json(text.decode()) for text in texts]
        return sorted(found, key=lambda record: -record.created_at)

    async def remove(self, context_id: str) -> None:
        """Forgets a context and leaves a tombstone."""
        await self._run(_REMOVE, context_id, self._clock(), self._generation)

    async def tombstones(self) -> set[str]:
        """Ids that were removed and not stored again; drops those that have expired."""
        kept = await self._run(_TOMBSTONES, self._clock() - TOMBSTONE_TTL_S)
        return {each.decode() for each in kept}

    async def put_nodes(self, addresses: Mapping[str, str], *, epoch: int) -> None:
        """Replaces the known nodes."""
        pairs = [text for pair in addresses.items() for text in pair]
        answer, number = await self._run(_PUT_NODES, epoch, *pairs)
        self._check_fence(answer, epoch, number)

    async def nodes(self) -> dict[str, str]:
        """The nodes that the last leader knew."""
        found = await self._ask(self._redis.hgetall(self._key["nodes"]))
        return {name.decode(): address.decode() for name, address in found.items()}

    async def beat(
        self, coordinator: str, since: int, known_epoch: int = 0, lease: Lease | None = None
    ) -> Beat:
        """Reports, asks for the lease and reads what changed, in one round trip."""
        holder, epoch, generation, revision, present, changed, removed = await self._run(
            _BEAT,
            coordinator,
            since,
            known_epoch,
            int(LEASE_TTL_S * 1000),
            int(PRESENT_S * 1000),
            secrets.token_hex(8),
            "" if lease is None else lease.epoch,
        )
        if lease is None:
            lease = Lease(holder.decode(), int(epoch), LEASE_TTL_S)
        return Beat(
            lease=lease.known_beside(int(epoch)),
            present=frozenset(each.decode() for each in present),
            generation=generation.decode(),
            revision=int(revision),
            records=tuple(
                (record_from_json(text.decode()), int(number))
                for text, number in zip(changed[::2], changed[1::2], strict=True)
            ),
            removed=tuple(
                (each.decode(), int(number))
                for each, number in zip(removed[::2], removed[1::2], strict=True)
            ),
        )

    async def close(self) -> None:
        """Ends the connections."""
        await self._redis.aclose()

    def _check_fence(self, answer: bytes, epoch: int, leading: int) -> None:
        if answer == b"fenced":
            raise Conflict(f"epoch {epoch} has passed; the leader's epoch is {leading}")

    async def _run(self, script: str, *values: Any) -> Any:
        return await self._ask(self._scripts[script](keys=self._keys, args=list(values)))

    async def _ask(self, call: Any) -> Any:
        try:
            return await call
        except (RedisError, OSError) as error:
            raise Unavailable(
                f"the catalog at {self._place} does not answer ({type(error).__name__}: {error}); "
                "running generations go on, new contexts wait for it: try again",
                reason="CATALOG_UNAVAILABLE",
                retry_after_s=RETRY_AFTER_S,
            ) from None


def _place(url: str) -> str:
    """Where the catalog is, without the password that the URL may hold."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}:{parts.port or 6379}"
