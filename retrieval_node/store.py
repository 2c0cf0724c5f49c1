"""What a retrieval node does, in domain types: put, seal, open, attend, append, read, drop.

The store checks capabilities, so no caller can reach KV that the coordinator did not allow. All
methods may be called from any thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Literal

from longreach import telemetry
from longreach.errors import (
    FailedPrecondition,
    IdentityMismatch,
    Internal,
    InvalidRequest,
    LongreachError,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from longreach.security import Capability, verify
from longreach.types import (
    AppendEntry,
    AttendResult,
    AttendRows,
    Identity,
    KvBlock,
    LayerGeometry,
    NodeStats,
    QuerySample,
    SessionInventory,
    SessionRecord,
    Shard,
    ShardInventory,
    Span,
    storage_dtype,
)
from retrieval_node.attend import Attended, attend
from retrieval_node.builds import Builder, ShardIndexes
from retrieval_node.contexts import Context, Contexts, Filling, Served
from retrieval_node.counters import Counters
from retrieval_node.fences import PlacementFences
from retrieval_node.memory import MemoryBudget, Use, resident_bytes
from retrieval_node.quality import QualitySampler
from retrieval_node.reading import read_blocks
from retrieval_node.sessions import Session, SessionTable, check_record
from retrieval_node.shard import TokenIds, check_geometry
from retrieval_node.shard_file import LoadedShard
from retrieval_node.snapshot import Snapshots
from retrieval_node.tail_places import tail_places

_LOG = logging.getLogger(__name__)
_APPEND_TOKENS = telemetry.counter("append_tokens").bind()
_ATTEND_ROWS = telemetry.counter("attend_rows").bind()
_CHECKSUM_FAILURES = telemetry.counter("checksum_failures").bind()


class PutStream:
    """One Put stream on a shard. Use as a context manager; leaving it keeps what was stored, so
    that the stream may be resumed until the shard's time-out."""

    def __init__(self, contexts: Contexts, target: Filling | Served) -> None:
        self._contexts = contexts
        self._target = target

    def __enter__(self) -> PutStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(self._target, Filling):
            self._contexts.end_put(self._target)

    def write(self, block: KvBlock) -> None:
        """Stores a block; into a sealed shard only what is there already. See FillingShard."""
        if isinstance(self._target, Filling):
            self._target.fill.write(block)
        else:
            self._target.sealed.check_same(block)

    def add_sample(self, sample: QuerySample) -> None:
        """Keeps prefill queries for the index; a sealed shard has all it needs."""
        if isinstance(self._target, Filling):
            self._target.fill.add_sample(sample, self._target.samples_reservation.grow)

    @property
    def bytes_total(self) -> int:
        """Bytes of K and V the shard has when it is complete."""
        if isinstance(self._target, Filling):
            return self._target.fill.nbytes
        return self._target.sealed.nbytes

    @property
    def bytes_stored(self) -> int:
        """Bytes of K and V the shard holds now."""
        if isinstance(self._target, Filling):
            return self._target.fill.bytes_written
        return self._target.sealed.nbytes


class Store:
    """The core of a retrieval node."""

    def __init__(
        self,
        *,
        secret: bytes,
        memory: MemoryBudget,
        builder: Builder,
        snapshots: Snapshots | None = None,
        isa: str = "",
        quality: QualitySampler | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._secret = secret
        self._memory = memory
        self._builder = builder
        self._snapshots = snapshots
        self._isa = isa
        self._quality = quality
        self._clock = clock
        self._loading = False
        self._contexts = Contexts(memory, builder.kind, clock)
        self._sessions = SessionTable(memory, builder, clock)
        self._fences = PlacementFences()
        self._counters = Counters()

    def put(
        self,
        context_id: str,
        shard: Shard,
        identity: Identity,
        layers: Sequence[LayerGeometry],
        capability: bytes,
        *,
        action: Literal["write", "place"] = "write",
    ) -> PutStream:
        """Begins or resumes filling a shard; its whole memory is reserved now. `action` is what the
        capability must allow.

        Raises PermissionDenied, InvalidRequest for a shard that cannot be, IdentityMismatch and
        FailedPrecondition when the node holds another shard in its place, ResourceExhausted.
        """
        allowed = self._allow(action, context_id, capability)
        if allowed.tenant != identity.tenant:
            raise PermissionDenied(
                f"the capability is for tenant {allowed.tenant!r}, the identity of tenant "
                f"{identity.tenant!r}",
                reason="CAPABILITY_FOR_OTHER",
            )
        if not context_id or not shard.shard_id or not len(shard.span):
            raise InvalidRequest(
                f"shard {shard.shard_id!r} {shard.span} of context {context_id!r}: both need a "
                "name and the shard at least one position"
            )
        check_dtype(identity)
        geometry = check_geometry(shard, layers)
        return PutStream(
            self._contexts, self._contexts.begin(context_id, shard, identity, geometry)
        )

    def seal(
        self, context_id: str, shard_id: str, capability: bytes, token_ids: TokenIds
    ) -> tuple[int, int]:
        """Makes a shard immutable and visible; returns its checksum and bytes.

        Sealing again is a no-op. Raises FailedPrecondition while anything is missing.
        """
        self._allow("write", context_id, capability)
        found = self._contexts.find(context_id, shard_id)
        served = self._seal(found, token_ids) if isinstance(found, Filling) else found
        served.sealed.check_tokens(served.sealed.shard.span, token_ids)
        return served.sealed.checksum, served.sealed.nbytes

    def found_for_copy(
        self, context_id: str, shard_id: str, capability: bytes
    ) -> Filling | Served | None:
        """A shard that may be copied here, as far as it is here. Raises PermissionDenied, and
        StaleEpoch for a copy that was decided on an older map."""
        allowed = self._allow("place", context_id, capability)
        self._fences.pass_or_raise(context_id, allowed.epoch)
        try:
            return self._contexts.find(context_id, shard_id)
        except NotFound:
            return None

    def sealed_for_copy(self, context_id: str, shard_id: str, capability: bytes) -> Served:
        """A shard to copy from here; raises NotFound, FailedPrecondition while it is filling."""
        self._allow("place", context_id, capability)
        found = self._contexts.find(context_id, shard_id)
        if isinstance(found, Filling):
            raise FailedPrecondition(
                f"shard {shard_id!r} of context {context_id!r} is not sealed on this node; copy it "
                "from another holder"
            )
        return found

    def seal_copy(
        self,
        context_id: str,
        shard_id: str,
        capability: bytes,
        token_ids: TokenIds,
        checksum: int,
    ) -> tuple[int, int]:
        """Makes a copied shard visible when it has the checksum of its source; returns checksum and
        bytes. Raises Internal, having dropped the shard, when it has another."""
        self._allow("place", context_id, capability)
        found = self._contexts.find(context_id, shard_id)
        served = self._seal(found, token_ids, checksum) if isinstance(found, Filling) else found
        return served.sealed.checksum, served.sealed.nbytes

    def drop_shards(self, context_id: str, shard_ids: Sequence[str], capability: bytes) -> int:
        """Forgets some shards of a context, which are elsewhere now; returns the bytes freed.

        Raises PermissionDenied, StaleEpoch when decided on an older map, and FailedPrecondition
        while one of them serves and a session over the context is open here: it may be reading it.
        """
        allowed = self._allow("place", context_id, capability)
        self._fences.pass_or_raise(context_id, allowed.epoch)
        serves = {
            item.shard.shard_id for item in self._contexts.inventory(context_id) if item.sealed
        }
        open_here = self._sessions.inventory(context_id)
        if open_here and serves.intersection(shard_ids):
            raise FailedPrecondition(
                f"{len(open_here)} sessions over context {context_id!r} are open on this node; "
                "drop its shards when they have ended",
                reason="SESSIONS_OPEN",
            )
        filling, served = self._contexts.pop_shards(context_id, shard_ids)
        return _free(filling) + sum(self._release(each) for each in served)

    def open_session(
        self,
        capability: bytes,
        record: SessionRecord,
        identity: Identity,
        tail_shards: Sequence[Shard],
        layers: Sequence[LayerGeometry],
    ) -> tuple[int, int]:
        """Opens, reopens or takes over a session; returns (handle, contiguous stop)."""
        check_record(record)
        check_dtype(identity)
        self._allow_session(capability, record, identity)
        if self._loading and record.context_id:
            # A context of several shards is there in part while they are being read.
            raise Unavailable(
                "the node is reading its snapshots; ask again when it is ready", retry_after_s=1.0
            )
        places = tail_places(tail_shards, layers)
        if record.context_id:
            context = self._contexts.get(record.context_id)
            context.check_identity(identity)
            _check_same_geometry(context, layers)
        handle, session = self._sessions.open(record, identity, places)
        return handle, session.agreed_stop()

    def close_session(self, handle: int) -> int:
        """Ends a session; returns the bytes of its tail and the tail's indexes."""
        return self._sessions.close(handle)

    def close_session_id(self, session_id: str, capability: bytes, epoch: int = 0) -> int:
        """Ends a session that its opener left behind, unless it was taken over since `epoch`;
        returns the bytes freed, 0 where there is none. Raises PermissionDenied."""
        verify(
            capability,
            self._secret,
            now=self._clock(),
            action="close",
            context_id="",
            session_id=session_id,
        )
        return self._sessions.close_id(session_id, epoch)

    def attend(
        self, layer: int, rows: Sequence[AttendRows], scale: float, softcap: float
    ) -> Attended:
        """Partial attention of rows of any sessions over one layer; an error for each bad row."""
        watch = self._quality.draw() if self._quality else None
        attended = attend(layer, rows, scale, softcap, self._find, watch)
        self._counters.count(attended.results)
        _ATTEND_ROWS.add(
            sum(
                len(each.queries)
                for each, result in zip(rows, attended.results, strict=True)
                if isinstance(result, AttendResult)
            )
        )
        return attended

    def append(self, entry: AppendEntry) -> tuple[int, LongreachError | None]:
        """Stores new KV of a session; returns the contiguous stop and why it was refused."""
        try:
            session = self._sessions.get(entry.handle)
        except LongreachError as error:
            return 0, error
        try:
            _APPEND_TOKENS.add(session.append(entry))
        except LongreachError as error:
            return session.tail.stop, error
        return session.tail.stop, None

    def read(self, handle: int, span: Span, layers: Sequence[int] = ()) -> Iterator[KvBlock]:
        """K and V of a session that the node holds within `span`; see read_blocks."""
        session, context = self._find(handle)
        return read_blocks(session, context, span, layers)

    def drop(self, context_id: str, capability: bytes) -> int:
        """Forgets a context and ends its sessions; returns the bytes freed. Repeating is a no-op.

        Attends that are at work keep the arrays alive until they are done.
        """
        self._allow("write", context_id, capability)
        context = self._contexts.pop(context_id)
        self._fences.forget(context_id)
        freed = self._sessions.end_of_context(context_id)
        if context is None:
            return freed
        freed += _free(context.filling.values())
        return freed + sum(self._release(each) for each in context.served.values())

    def inventory(
        self, context_id: str = ""
    ) -> tuple[list[ShardInventory], list[SessionInventory]]:
        """Every shard the node holds and the open sessions; of one context when given."""
        return self._contexts.inventory(context_id), self._sessions.inventory(context_id)

    @property
    def builds_running(self) -> int:
        """Builds of a layer's index that are under way now."""
        return self._builder.running

    def stats(self) -> NodeStats:
        """Memory and counters."""
        requests, work = self._counters.totals()
        return NodeStats(
            memory_limit_bytes=self._memory.limit_bytes,
            context_bytes=self._memory.used(Use.CONTEXT),
            index_bytes=self._memory.used(Use.INDEX),
            tail_bytes=self._memory.used(Use.TAIL),
            rss_bytes=resident_bytes(),
            sessions=len(self._sessions),
            attend_requests=requests,
            work=work,
            isa=self._isa,
        )

    def load_snapshots(self) -> int:
        """Serves every intact shard of the snapshot directory; returns how many."""
        self.expect_snapshots()
        try:
            if self._snapshots is None:
                return 0
            return self._snapshots.load(self._memory, self._serve_loaded)
        finally:
            self._loading = False

    def expect_snapshots(self) -> None:
        """Refuses sessions over contexts until `load_snapshots` is done."""
        self._loading = True

    def expire(self, fill_timeout_s: float, session_timeout_s: float) -> None:
        """Drops filling shards and closes sessions that their owners left behind."""
        abandoned = self._contexts.pop_abandoned(fill_timeout_s)
        freed = _free(abandoned)
        if abandoned:
            _LOG.warning("dropped %d abandoned filling shards, %d bytes", len(abandoned), freed)
        for session_id in self._sessions.end_idle(session_timeout_s):
            _LOG.warning("closed session %s, idle for %g s", session_id, session_timeout_s)

    def close(self) -> None:
        """Stops background work; a snapshot that is being written is finished."""
        self._builder.close()
        if self._quality is not None:
            self._quality.close()
        if self._snapshots is not None:
            self._snapshots.close()

    def _release(self, served: Served) -> int:
        freed = served.indexes.release() + served.reservation.release()
        if self._snapshots is not None:
            self._snapshots.remove(served)
        return freed

    def _seal(
        self, filling: Filling, token_ids: TokenIds, expected_checksum: int | None = None
    ) -> Served:
        fill = filling.fill
        self._contexts.check_tokens(fill.context_id, fill.shard.span, token_ids)
        sealed = fill.seal(token_ids)
        if expected_checksum not in (None, sealed.checksum):
            _CHECKSUM_FAILURES.add()
            _free(self._contexts.pop_shards(fill.context_id, [fill.shard.shard_id])[0])
            raise Internal(
                f"shard {fill.shard.shard_id!r} of context {fill.context_id!r} came with checksum "
                f"{sealed.checksum:08x} and was sealed with {expected_checksum:08x}; the copy was "
                "dropped: copy it again, from another holder if there is one",
                reason="CHECKSUM_MISMATCH",
            )
        samples = fill.samples()
        indexes = ShardIndexes(sealed, samples, filling.samples_reservation, self._builder.kind)
        served = Served(sealed, indexes, filling.reservation)
        winner = self._contexts.publish(filling, served)
        if winner is served:
            if self._snapshots is not None:
                self._snapshots.save(served, samples)
            self._start_builds(served)
        return winner

    def _serve_loaded(self, loaded: LoadedShard) -> None:
        sealed = loaded.sealed
        indexes = ShardIndexes(
            sealed, loaded.samples, loaded.samples_reservation, self._builder.kind
        )
        for layer, each in loaded.indexes.items():
            indexes.finished(layer, each.index, each.reservation, 0.0)
        served = Served(sealed, indexes, loaded.reservation, loaded.path)
        self._contexts.add_loaded(served)
        self._start_builds(served)

    def _start_builds(self, served: Served) -> None:
        """Builds what indexes the shard lacks; each is written to disk when it is done."""
        if self._snapshots is None:
            self._builder.start(served.indexes)
        else:
            self._builder.start(served.indexes, self._snapshots.index_saver(served))

    def _find(self, handle: int) -> tuple[Session, Context | None]:
        session = self._sessions.get(handle)
        context_id = session.record.context_id
        return session, self._contexts.get(context_id) if context_id else None

    def _allow(
        self, action: Literal["write", "place"], context_id: str, capability: bytes
    ) -> Capability:
        return verify(
            capability, self._secret, now=self._clock(), action=action, context_id=context_id
        )

    def _allow_session(self, capability: bytes, record: SessionRecord, identity: Identity) -> None:
        allowed = verify(
            capability,
            self._secret,
            now=self._clock(),
            action="read",
            context_id=record.context_id,
            session_id=record.session_id,
        )
        asked = (record.tenant, identity.tenant, record.epoch)
        if (allowed.tenant, allowed.tenant, allowed.epoch) != asked:
            raise PermissionDenied(
                f"the capability is for tenant {allowed.tenant!r} and epoch {allowed.epoch}; the "
                f"record has tenant {record.tenant!r} and epoch {record.epoch}, the identity "
                f"tenant {identity.tenant!r}",
                reason="CAPABILITY_FOR_OTHER",
            )


def check_dtype(identity: Identity) -> None:
    """Raises InvalidRequest unless the identity's dtype is one that KV may have."""
    try:
        storage_dtype(identity.dtype)
    except ValueError as error:
        raise InvalidRequest(str(error), reason="UNKNOWN_DTYPE") from None


def _check_same_geometry(context: Context, layers: Sequence[LayerGeometry]) -> None:
    for each in layers:
        known = context.geometry.get(each.layer, each)
        if known != each:
            raise IdentityMismatch(
                f"layer {each.layer} of context {context.context_id!r} is {known}, not {each}",
                reason="GEOMETRY_MISMATCH",
            )


def _free(fillings: Iterable[Filling]) -> int:
    freed = 0
    for each in fillings:
        each.fill.drop()
        freed += each.reservation.release() + each.samples_reservation.release()
    return freed
