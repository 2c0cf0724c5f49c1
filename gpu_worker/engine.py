"""A worker without its server: the model, the device's thread, sessions and prefills.

Callers are server threads. Whatever touches the device or the open sessions is handed to the one
thread that owns them; whatever waits for nodes outside the token path stays on the caller's.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from gpu_worker.appends import Appends
from gpu_worker.asks import NodeSession
from gpu_worker.chunking import ChunkSizer
from gpu_worker.config import WorkerConfig
from gpu_worker.decoding import Decoder, check_tokens
from gpu_worker.fanout import FanOut
from gpu_worker.ingest import Ingest
from gpu_worker.model import Model, rss_bytes
from gpu_worker.offload import Destination
from gpu_worker.opening import Opened, Opener
from gpu_worker.patterns.dense import Dense
from gpu_worker.patterns.spec import canonical, pattern_for_model
from gpu_worker.resident import LocalSlab
from gpu_worker.routes import plan_route
from gpu_worker.sampling import check_sampling
from gpu_worker.scheduler import DeviceThread
from gpu_worker.session import Session
from gpu_worker.step_trace import traced_step
from longreach.errors import IdentityMismatch, InvalidRequest, PermissionDenied, StaleEpoch
from longreach.rpc.retrieval import AppendStream, AttendStream, NodeClient
from longreach.rpc.tls import ChannelTls
from longreach.security import Role, TlsFiles, verify
from longreach.security.peers import ServerNames
from longreach.steps import PrefillProgress, StepOutcome, StepRow, WorkerStatus
from longreach.types import Budget, Identity, SessionRecord, ShardMap


class Engine:
    """Serves one model. `start` before use, `stop` at the end. With `files` it speaks to nodes by
    mutual TLS, each known by its own name."""

    def __init__(self, model: Model, config: WorkerConfig, files: TlsFiles | None = None) -> None:
        self.model = model
        self._config = config
        pattern = pattern_for_model(config.prefill_pattern, model.info)
        self._pattern = None if isinstance(pattern, Dense) else pattern
        self.info = replace(
            model.info, identity=replace(model.info.identity, prefill=canonical(pattern))
        )
        self._slab = LocalSlab(
            model.layers,
            slots=config.max_sessions,
            sink=config.sink_tokens,
            window=config.window_tokens,
            max_row_tokens=config.max_row_tokens,
            dtype=model.dtype,
            device=model.device,
        )
        self._loop = asyncio.new_event_loop()
        self._node_names = ServerNames(Role.NODE)
        self._tls = ChannelTls(files, self._node_names) if files else None
        self._fanout = FanOut(
            model.layers, self._loop, functools.partial(AttendStream, tls=self._tls)
        )
        self._appends = Appends(model.layers, functools.partial(AppendStream, tls=self._tls))
        self._opener = Opener(
            model.layers,
            self._slab.kinds,
            self._slab.kind_of,
            config.window_tokens,
            functools.partial(NodeClient, tls=self._tls),
        )
        self._decoder = Decoder(
            model,
            self._slab,
            self._fanout,
            self._appends,
            step_deadline_s=config.step_deadline_ms / 1e3,
            append_timeout_s=config.append_timeout_ms / 1e3,
        )
        self._nodes: dict[str, NodeSession] = {}
        self._device = DeviceThread()
        self._prefills = 0
        self._prefills_lock = threading.Lock()

    def start(self) -> None:
        """Begins to take work."""
        self._device.start()

    def stop(self) -> None:
        """Ends the work under way and every connection."""
        self._device.call(self._fanout.close).exception()
        self._device.stop()
        self._appends.close()
        self._opener.disconnect()
        self._loop.close()

    def prefill(
        self, to: Destination, token_ids: Sequence[int], cancelled: threading.Event
    ) -> Iterator[PrefillProgress]:
        """Prefills a context and stores it on its nodes; the last progress has the summary.

        Setting `cancelled` ends it between two chunks. Raises IdentityMismatch, InvalidRequest,
        Cancelled and what nodes refuse with.
        """
        self._check_identity(to.identity)
        self._check_leave("write", to.capability, to.context_id, to.identity)
        self._node_names.learn(to.shard_map.addresses)
        info = self.info
        if not 1 <= len(token_ids) <= info.max_positions:
            raise InvalidRequest(
                f"the context has {len(token_ids)} tokens; model {info.model!r} takes 1 to "
                f"{info.max_positions}"
            )
        check_tokens(token_ids, info.vocab_size)
        plan_route(to.shard_map, self.model.layers, len(token_ids))
        if len(token_ids) != max(shard.span.stop for shard in to.shards):
            raise InvalidRequest(
                f"{len(token_ids)} token ids for shards that end at "
                f"{max(shard.span.stop for shard in to.shards)}; send those up to there"
            )
        sizer = ChunkSizer(
            self._config.prefill_chunk_tokens,
            shared_target_s=self._config.prefill_shared_chunk_ms / 1e3,
            alone_target_s=self._config.prefill_chunk_ms / 1e3,
        )
        ingest = Ingest(
            self.model,
            self._device,
            to,
            token_ids,
            sizer,
            cancelled,
            self._pattern,
            functools.partial(NodeClient, tls=self._tls),
        )
        return self._counted(ingest.run())

    def _counted(self, progress: Iterator[PrefillProgress]) -> Iterator[PrefillProgress]:
        with self._prefills_lock:
            self._prefills += 1
        try:
            yield from progress
        finally:
            with self._prefills_lock:
                self._prefills -= 1

    def open_session(
        self,
        record: SessionRecord,
        identity: Identity,
        shard_map: ShardMap,
        capability: bytes,
        budget: Budget,
        min_coverage: float,
    ) -> tuple[int, int]:
        """Makes a session ready; returns where its next row starts and its resident bytes.

        A session that is open here already is replaced. Raises ResourceExhausted when no slot is
        free, IdentityMismatch, and what nodes refuse with.
        """
        self._check_identity(identity)
        self._check_leave("read", capability, record.context_id, identity, record)
        self._node_names.learn(shard_map.addresses)
        check_sampling(record.sampling)
        if not 0 <= min_coverage <= 1:
            raise InvalidRequest(f"min_coverage is {min_coverage}; it must be in [0, 1]")
        route = plan_route(shard_map, self.model.layers, record.context_stop)
        slot = self._device.call(lambda: self._take_slot(record)).result()
        try:
            opened = self._opener.open(record, identity, route, capability)
        except BaseException:
            self._device.call(lambda: self._slab.release(slot)).result()
            raise
        session = Session(record, budget, min_coverage, slot, opened.stop, route, time.monotonic())
        self._device.call(lambda: self._admit(session, opened)).result()
        return opened.stop, self._slab.bytes_per_slot

    def close_session(self, session_id: str, close_on_nodes: bool, epoch: int = 0) -> bool:
        """Ends a session here and, when asked, on its nodes, unless it is open under a newer epoch
        than a given one; whether it was open and is so nowhere now that was to be closed."""

        def forget() -> NodeSession | None:
            session = self._decoder.sessions.get(session_id)
            if session is not None and 0 < epoch < session.record.epoch:
                return None
            return self._forget(session_id)

        nodes = self._device.call(forget).result()
        if nodes is None:
            return False
        return self._opener.close(nodes) if close_on_nodes else True

    def step(self, rows: Sequence[StepRow], traceparent: str = "") -> StepOutcome:
        """Feeds rows of many sessions in one forward pass; failures are in the results."""
        asked = time.perf_counter()

        def work() -> StepOutcome:
            queued_s = time.perf_counter() - asked
            with traced_step(traceparent, queued_s) as trace:
                outcome = self._decoder.step(rows, trace)
            return replace(outcome, timing=replace(outcome.timing, queue_s=queued_s))

        return self._device.call(work).result()

    @property
    def prefills_running(self) -> int:
        """Prefills that run, wait for the device or seal."""
        return self._prefills

    @property
    def nodes_refused(self) -> int:
        """Nodes that are not asked now, because connections to them failed again and again."""
        return self._fanout.refused()

    def status(self) -> WorkerStatus:
        """What this worker is and what it holds."""
        slab = self._slab
        return WorkerStatus(
            model=self.info,
            device=str(self.model.device),
            max_sessions=slab.slots,
            sessions=slab.slots_used,
            max_row_tokens=slab.max_row_tokens,
            sink_tokens=slab.sink,
            window_tokens=slab.window,
            resident_capacity_bytes=slab.slots * slab.bytes_per_slot,
            resident_used_bytes=slab.slots_used * slab.bytes_per_slot,
            rss_bytes=rss_bytes(),
        )

    def _check_identity(self, identity: Identity) -> None:
        own = replace(self.info.identity, tenant=identity.tenant)
        if identity != own:
            raise IdentityMismatch(
                f"this worker's KV is of another identity than asked: {identity.difference(own)}; "
                "send the request to a worker of that model"
            )

    def _check_leave(
        self,
        action: Literal["read", "write"],
        capability: bytes,
        context_id: str,
        identity: Identity,
        record: SessionRecord | None = None,
    ) -> None:
        """Nodes check capabilities too; here it keeps strangers from the device."""
        if not self._config.cluster_secret:
            return
        leave = verify(
            capability,
            self._config.cluster_secret.encode(),
            now=time.time(),
            action=action,
            context_id=context_id,
            session_id=record.session_id if record else "",
        )
        asked = (identity.tenant, record.epoch if record else 0)
        if (leave.tenant, leave.epoch) != asked:
            raise PermissionDenied(
                f"the capability is for tenant {leave.tenant!r} and epoch {leave.epoch}, not for "
                f"{asked[0]!r} and {asked[1]}",
                reason="CAPABILITY_FOR_OTHER",
            )

    def _take_slot(self, record: SessionRecord) -> int:
        """A slot for a session, whose older self here gives its own back; on the device's thread.

        Raises StaleEpoch where a newer one is open.
        """
        open_here = self._decoder.sessions.get(record.session_id)
        if open_here is not None and open_here.record.epoch > record.epoch:
            raise StaleEpoch(
                f"session {record.session_id!r} is open here under epoch "
                f"{open_here.record.epoch}, newer than {record.epoch}"
            )
        self._forget(record.session_id)
        if self._slab.slots_used == self._slab.slots:
            self._forget_idle()
        return self._slab.acquire()

    def _forget_idle(self) -> None:
        """Frees the slots of sessions nobody stepped for long: their nodes can give them back."""
        oldest = time.monotonic() - self._config.session_timeout_s
        for session in list(self._decoder.sessions.values()):
            if session.last_used < oldest:
                self._forget(session.session_id)

    def _admit(self, session: Session, opened: Opened) -> None:
        """Makes an opened session known; on the device's thread."""
        self._forget(session.session_id)
        for part in opened.resident:
            self._slab.place(part.layer, session.slot, part.start, 0, part.keys, part.values)
        self._slab.occupy(session.slot, opened.stop)
        session_id = session.session_id
        self._nodes[session_id] = opened.nodes
        self._fanout.attach(session_id, opened.nodes)
        self._appends.open(session_id, session.record.epoch, opened.nodes, opened.stop)
        self._decoder.sessions[session_id] = session

    def _forget(self, session_id: str) -> NodeSession | None:
        """Frees what the worker holds of a session; on the device's thread."""
        session = self._decoder.sessions.pop(session_id, None)
        if session is None:
            return None
        self._slab.release(session.slot)
        self._fanout.detach(session_id)
        self._appends.close_session(session_id)
        return self._nodes.pop(session_id)
