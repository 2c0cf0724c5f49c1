"""Open sessions and the handles that name them."""

from __future__ import annotations

import itertools
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence

from longreach.errors import FailedPrecondition, InvalidRequest, NotFound
from longreach.types import (
    AppendEntry,
    Identity,
    LayerGeometry,
    SessionInventory,
    SessionRecord,
    storage_dtype,
)
from retrieval_node.builds import Builder
from retrieval_node.memory import MemoryBudget
from retrieval_node.tail import SessionTail, stale_epoch
from retrieval_node.tail_chunks import TailPiece
from retrieval_node.tail_places import TailPlace

_HANDLE_BITS = 64


class Session:
    """One generation over a context, as a node knows it. `lock` guards the tail and the epoch."""

    def __init__(
        self,
        record: SessionRecord,
        identity: Identity,
        places: Sequence[TailPlace],
        memory: MemoryBudget,
        builder: Builder,
        now: float,
    ) -> None:
        self.record = record
        self.identity = identity
        self.dtype = storage_dtype(identity.dtype)
        self.epoch = record.epoch
        self.last_used = now
        self.lock = threading.Lock()
        self.ended = ""
        self.handles: list[int] = []
        self._memory = memory
        self._builder = builder
        self.tail = self._fresh_tail(places)

    @property
    def geometry(self) -> Mapping[int, LayerGeometry]:
        """Geometry by layer of what the tail keeps."""
        return self.tail.geometry

    @property
    def handle(self) -> int:
        """The handle that is valid now: the last one given out."""
        return self.handles[-1]

    def tail_view(self, layer: int) -> list[TailPiece]:
        """K and V of the tail held now; see SessionTail.view."""
        with self.lock:
            return self.tail.view(layer)

    def take_over(self, record: SessionRecord, places: Sequence[TailPlace]) -> None:
        """Continues under a newer epoch; another set of heads on this node starts a new tail."""
        with self.lock:
            self.record = record
            self.epoch = record.epoch
            if tuple(places) != self.tail.places:
                self.tail.release()
                self.tail = self._fresh_tail(places)

    def agreed_stop(self) -> int:
        """The position after the last one held whose token is the record's; without token ids in
        the record, after the last one held.

        Who takes a session over may know other tokens than the last writer stored: theirs win, and
        their first append cuts the rest off.
        """
        with self.lock:
            known = self.record.known_ids
            if not known:
                return self.tail.stop
            pairs = zip(self.tail.token_ids, known, strict=False)
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
            return self.tail.start + sum(1 for _ in same)

    def append(self, entry: AppendEntry) -> int:
        """Stores new KV; see SessionTail.append."""
        with self.lock:
            self._check_open()
            if entry.epoch < self.epoch:
                raise stale_epoch(entry.epoch, self.epoch)
            stored = self.tail.append(entry)
            self.epoch = entry.epoch
            return stored

    def end(self, why: str) -> int:
        """Frees the tail and its indexes; `why` is what later callers are told. Returns the bytes
        freed."""
        with self.lock:
            self.ended = why
            freed = self.tail.release()
            self.tail = self._fresh_tail(())
            return freed

    def _check_open(self) -> None:
        if self.ended:
            raise NotFound(self.ended, reason="SESSION_ENDED")

    def _fresh_tail(self, places: Sequence[TailPlace]) -> SessionTail:
        name = f"tail of session {self.record.session_id!r}"
        return SessionTail(
            name, self.record.context_stop, self.dtype, places, self._memory, self._builder
        )


class SessionTable:
    """Sessions by handle and by id. Thread-safe.

    A takeover gives a new handle and keeps the old one only to tell its holder that it is stale.
    """

    def __init__(self, memory: MemoryBudget, builder: Builder, clock: Callable[[], float]) -> None:
        self._memory = memory
        self._builder = builder
        self._clock = clock
        self._lock = threading.Lock()
        self._by_handle: dict[int, tuple[Session, int]] = {}
        self._by_id: dict[str, Session] = {}

    def open(
        self, record: SessionRecord, identity: Identity, places: Sequence[TailPlace]
    ) -> tuple[int, Session]:
        """Opens, reopens (same epoch) or takes over (newer epoch) a session.

        Returns its handle. Raises StaleEpoch for an older epoch and FailedPrecondition when the
        session continues another context or position.
        """
        with self._lock:
            session = self._by_id.get(record.session_id)
            if session is None:
                session = Session(
                    record, identity, places, self._memory, self._builder, self._clock()
                )
                self._by_id[record.session_id] = session
                return self._new_handle(session), session
            if record.epoch < session.epoch:
                raise stale_epoch(record.epoch, session.epoch)
            _check_same_session(record, identity, session)
            session.last_used = self._clock()
            _, epoch = self._by_handle[session.handle]
            if record.epoch == epoch and tuple(places) == session.tail.places:
                return session.handle, session
            session.take_over(record, places)
            return self._new_handle(session), session

    def get(self, handle: int) -> Session:
        """The session of a handle; raises NotFound or, after a takeover, StaleEpoch."""
        session, epoch = self._by_handle.get(handle, (None, 0))
        if session is None:
            raise NotFound(
                f"no session has handle {handle:#018x} on this node; open the session again: the "
                "node may have restarted, or the session was closed",
                reason="UNKNOWN_HANDLE",
            )
        if handle != session.handle:
            raise stale_epoch(epoch, session.epoch)
        session.last_used = self._clock()
        return session

    def close(self, handle: int) -> int:
        """Ends a session; returns the bytes freed. Raises as `get` does."""
        with self._lock:
            session = self.get(handle)
            return self._end(session, "the session was closed; open it again")

    def close_id(self, session_id: str, epoch: int = 0) -> int:
        """Ends a session by id, if there is one and its epoch is not newer than a given one;
        returns the bytes freed."""
        with self._lock:
            session = self._by_id.get(session_id)
            if session is None or 0 < epoch < session.epoch:
                return 0
            return self._end(session, "the session was closed by its coordinator; open it again")

    def end_of_context(self, context_id: str) -> int:
        """Ends every session on a context that is being dropped; returns the bytes freed."""
        with self._lock:
            ending = [s for s in self._by_id.values() if s.record.context_id == context_id]
            why = f"context {context_id!r} was dropped and its sessions ended"
            return sum(self._end(session, why) for session in ending)

    def end_idle(self, timeout_s: float) -> list[str]:
        """Ends sessions that nobody used for `timeout_s` seconds; returns their ids."""
        with self._lock:
            oldest = self._clock() - timeout_s
            idle = [s for s in self._by_id.values() if s.last_used < oldest]
            for session in idle:
                self._end(session, f"the session was idle for {timeout_s:g} s; open it again")
            return [session.record.session_id for session in idle]

    def inventory(self, context_id: str = "") -> list[SessionInventory]:
        """Open sessions by id, of one context when it is given."""
        with self._lock:
            return [
                SessionInventory(session_id, session.record.coordinator_id, session.epoch)
                for session_id, session in sorted(self._by_id.items())
                if not context_id or session.record.context_id == context_id
            ]

    def __len__(self) -> int:
        return len(self._by_id)

    def _new_handle(self, session: Session) -> int:
        handle = 0
        while handle == 0 or handle in self._by_handle:
            handle = secrets.randbits(_HANDLE_BITS)
        session.handles.append(handle)
        self._by_handle[handle] = (session, session.record.epoch)
        return handle

    def _end(self, session: Session, why: str) -> int:
        for handle in session.handles:
            del self._by_handle[handle]
        del self._by_id[session.record.session_id]
        return session.end(why)


def _check_same_session(record: SessionRecord, identity: Identity, session: Session) -> None:
    known = session.record
    if identity != session.identity or (known.context_id, known.context_stop) != (
        record.context_id,
        record.context_stop,
    ):
        raise FailedPrecondition(
            f"session {record.session_id!r} is open on context {known.context_id!r} up to "
            f"{known.context_stop}, not on {record.context_id!r} up to {record.context_stop} with "
            "that identity; close it first or use another session id",
            reason="SESSION_CONFLICT",
        )


def check_record(record: SessionRecord) -> None:
    """Raises InvalidRequest for a record that no session can have."""
    if not record.session_id:
        raise InvalidRequest("the session record has no session_id")
    if record.context_stop < 0 or (record.context_stop and not record.context_id):
        raise InvalidRequest(
            f"context_stop is {record.context_stop} for context {record.context_id!r}; a session "
            "without a context starts at 0"
        )
