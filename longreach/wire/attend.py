"""Attend: one message for each layer, with the rows of every session of the step.

Queries of all rows lie behind one another in one tensor [sum of rows * q_heads, head_dim], so a
message costs one copy however many sessions share it; outputs and lse come back the same way.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longreach.errors import Internal, InvalidRequest, LongreachError, Unavailable
from longreach.types import (
    STORAGE_DTYPES,
    AttendResult,
    AttendRows,
    Budget,
    FloatArray,
    PartialAttention,
    Span,
    StorageArray,
    WorkFigures,
)
from longreach.v1 import retrieval_pb2
from longreach.wire.failures import error_from_proto, error_to_proto
from longreach.wire.placement import span_from_proto, span_to_proto
from longreach.wire.session import (
    budget_from_proto,
    budget_to_proto,
    work_from_proto,
    work_to_proto,
)
from longreach.wire.steps import microseconds
from longreach.wire.tensor import tensor_from_proto, tensor_to_proto

_FLOAT32 = np.dtype("<f4")


@dataclass(frozen=True, slots=True)
class NodeTiming:
    """Where a node's time went on one Attend message, seconds.

    queue_s: from arrival to the start of work; search_s: choosing keys; attend_s: softmax and
    values (all of it for kinds that fuse the two); merge_s: merging the node's partials, encoding.
    """

    queue_s: float = 0.0
    search_s: float = 0.0
    attend_s: float = 0.0
    merge_s: float = 0.0

    @property
    def total_s(self) -> float:
        """All four."""
        return self.queue_s + self.search_s + self.attend_s + self.merge_s


def attend_request(
    request_id: int,
    layer: int,
    rows: Sequence[AttendRows],
    scale: float,
    softcap: float,
    traceparent: str = "",
) -> retrieval_pb2.AttendRequest:
    """The message for these rows of a layer; their queries share one dtype and head_dim.
    `traceparent` is that of the span it belongs to, where the step is traced."""
    return retrieval_pb2.AttendRequest(
        request_id=request_id,
        layer=layer,
        rows=[_rows_to_proto(each) for each in rows],
        queries=tensor_to_proto(_stacked_queries(rows)),
        scale=scale,
        softcap=softcap,
        traceparent=traceparent,
    )


def _stacked_queries(rows: Sequence[AttendRows]) -> StorageArray:
    flat = [each.queries.reshape(-1, each.queries.shape[-1]) for each in rows]
    if len(flat) == 1:
        return flat[0]
    kinds = {(part.dtype, part.shape[1]) for part in flat}
    if len(kinds) != 1:
        found = ", ".join(sorted(f"{dtype.name} x {dim}" for dtype, dim in kinds))
        raise InvalidRequest(
            f"queries of one message must share dtype and head_dim; found {found or 'no rows'}"
        )
    return np.concatenate(flat)


def _rows_to_proto(rows: AttendRows) -> retrieval_pb2.AttendRows:
    count, q_heads, _ = rows.queries.shape
    header = _header_to_proto(
        rows.handle,
        count,
        q_heads,
        rows.kv_head_start,
        rows.kv_head_stop,
        rows.scope,
        rows.budget,
    )
    if rows.logit_floor is None:
        return header
    whole = retrieval_pb2.AttendRows(logit_floor=tensor_to_proto(rows.logit_floor))
    whole.MergeFrom(header)
    return whole


@functools.lru_cache(maxsize=1024)
def _header_to_proto(
    handle: int, rows: int, q_heads: int, start: int, stop: int, scope: Span, budget: Budget
) -> retrieval_pb2.AttendRows:
    """An entry without tensors. The layers of a step repeat it, so it is made once; not to be
    written to."""
    return retrieval_pb2.AttendRows(
        handle=handle,
        rows=rows,
        kv_head_start=start,
        kv_head_stop=stop,
        scope=span_to_proto(scope),
        budget=budget_to_proto(budget),
        q_heads=q_heads,
    )


def attend_rows_from_proto(request: retrieval_pb2.AttendRequest) -> list[AttendRows]:
    """The rows of a message; their queries are views of the message's.

    Raises InvalidRequest or MalformedTensor: queries are finite, each entry has at least one row,
    its q_heads are a multiple of its KV heads, and all entries together take every query.
    """
    if not (math.isfinite(request.scale) and math.isfinite(request.softcap)):
        raise InvalidRequest(f"scale {request.scale}, softcap {request.softcap} must be finite")
    queries = tensor_from_proto(
        request.queries,
        name="queries [rows * q_heads, head_dim]",
        shape=(None, None),
        dtype=STORAGE_DTYPES,
        finite=True,
    )
    head_dim = queries.shape[1]
    rows: list[AttendRows] = []
    taken = 0
    for msg in request.rows:
        header = _header_from_proto(msg)
        stop = taken + header.rows * header.q_heads
        if stop > len(queries):
            break
        part = queries[taken:stop].reshape(header.rows, header.q_heads, head_dim)
        rows.append(_rows_from_proto(msg, header, part))
        taken = stop
    if taken != len(queries) or len(rows) != len(request.rows) or not rows:
        named = sum(msg.rows * msg.q_heads for msg in request.rows)
        raise InvalidRequest(
            f"{len(request.rows)} entries name {named} queries but the message holds "
            f"{len(queries)}; every query belongs to exactly one entry"
        )
    return rows


@dataclass(frozen=True, slots=True)
class _RowsHeader:
    """What an entry says beside its tensors."""

    rows: int
    q_heads: int
    kv_head_start: int
    kv_head_stop: int
    scope: Span
    budget: Budget


def _header_from_proto(msg: retrieval_pb2.AttendRows) -> _RowsHeader:
    """The checked header of an entry. The layers of a step repeat it, so it is read once."""
    if msg.HasField("logit_floor"):
        return _read_header(msg)
    return _repeated_header(msg.SerializeToString(deterministic=True))


@functools.lru_cache(maxsize=1024)
def _repeated_header(serialized: bytes) -> _RowsHeader:
    return _read_header(retrieval_pb2.AttendRows.FromString(serialized))


def _read_header(msg: retrieval_pb2.AttendRows) -> _RowsHeader:
    kv_heads = msg.kv_head_stop - msg.kv_head_start
    if msg.rows < 1 or kv_heads < 1 or msg.q_heads < 1 or msg.q_heads % kv_heads:
        raise InvalidRequest(
            f"entry with {msg.rows} rows of {msg.q_heads} query heads for KV heads "
            f"[{msg.kv_head_start}, {msg.kv_head_stop}); rows must be at least 1 and query heads "
            "a positive multiple of the KV heads"
        )
    return _RowsHeader(
        rows=msg.rows,
        q_heads=msg.q_heads,
        kv_head_start=msg.kv_head_start,
        kv_head_stop=msg.kv_head_stop,
        scope=span_from_proto(msg.scope, name="scope"),
        budget=budget_from_proto(msg.budget),
    )


def _rows_from_proto(
    msg: retrieval_pb2.AttendRows, header: _RowsHeader, queries: StorageArray
) -> AttendRows:
    floor: FloatArray | None = None
    if msg.HasField("logit_floor"):
        floor = tensor_from_proto(
            msg.logit_floor,
            name="logit_floor [rows, q_heads]",
            shape=queries.shape[:2],
            dtype=_FLOAT32,
        )
    return AttendRows(
        handle=msg.handle,
        kv_head_start=header.kv_head_start,
        kv_head_stop=header.kv_head_stop,
        scope=header.scope,
        budget=header.budget,
        queries=queries,
        logit_floor=floor,
    )


def attend_response(
    request_id: int,
    results: Sequence[AttendResult | LongreachError],
    shapes: Sequence[tuple[int, int, int]],
    timing: NodeTiming,
) -> retrieval_pb2.AttendResponse:
    """The reply to a message whose entries had shapes (rows, q_heads, value_dim).

    An entry that failed travels as its error, with zeros and -inf in its place.
    """
    outputs, lses = [], []
    for result, (rows, q_heads, value_dim) in zip(results, shapes, strict=True):
        if isinstance(result, LongreachError):
            outputs.append(np.zeros((rows * q_heads, value_dim), np.float32))
            lses.append(np.full(rows * q_heads, -np.inf, np.float32))
        else:
            outputs.append(result.partial.output.reshape(rows * q_heads, value_dim))
            lses.append(result.partial.lse.reshape(rows * q_heads))
    output = outputs[0] if len(outputs) == 1 else np.concatenate(outputs)
    lse = lses[0] if len(lses) == 1 else np.concatenate(lses)
    return retrieval_pb2.AttendResponse(
        request_id=request_id,
        outputs=tensor_to_proto(output),
        lse=tensor_to_proto(lse),
        checksum=_checksum(output, lse),
        results=[_result_to_proto(result) for result in results],
        timing=retrieval_pb2.AttendTiming(
            queue_us=microseconds(timing.queue_s),
            search_us=microseconds(timing.search_s),
            attend_us=microseconds(timing.attend_s),
            merge_us=microseconds(timing.merge_s),
        ),
    )


def _result_to_proto(result: AttendResult | LongreachError) -> retrieval_pb2.AttendRowsResult:
    if isinstance(result, LongreachError):
        return retrieval_pb2.AttendRowsResult(error=error_to_proto(result))
    return retrieval_pb2.AttendRowsResult(
        work=work_to_proto(result.work), index_kind=result.index_kind
    )


def attend_results_from_proto(
    response: retrieval_pb2.AttendResponse, shapes: Sequence[tuple[int, int]]
) -> list[AttendResult | LongreachError]:
    """One result or error for each entry of the request, whose shapes were (rows, q_heads).

    A message that was refused as a whole gives its error for every entry. Raises Internal when the
    reply does not have the request's entries, and Unavailable when its numbers were damaged on the
    way: another copy of the shard can be asked then.
    """
    if response.HasField("error"):
        return [error_from_proto(response.error) for _ in shapes]
    if len(response.results) != len(shapes):
        raise Internal(
            f"the node answered {len(response.results)} entries of {len(shapes)}; "
            "run the same version of longreach everywhere"
        )
    queries = sum(rows * q_heads for rows, q_heads in shapes)
    outputs = tensor_from_proto(
        response.outputs, name="outputs", shape=(queries, None), dtype=_FLOAT32
    )
    lse = tensor_from_proto(response.lse, name="lse", shape=(queries,), dtype=_FLOAT32)
    if response.HasField("checksum") and response.checksum != _checksum(outputs, lse):
        raise Unavailable(
            f"reply {response.request_id} of {queries} queries does not have the checksum that the "
            "node gave it; where this repeats, the memory of the node or the worker is faulty",
            reason="DAMAGED_REPLY",
        )
    results: list[AttendResult | LongreachError] = []
    taken = 0
    for msg, (rows, q_heads) in zip(response.results, shapes, strict=True):
        stop = taken + rows * q_heads
        if msg.HasField("error"):
            results.append(error_from_proto(msg.error))
        else:
            partial = PartialAttention(
                outputs[taken:stop].reshape(rows, q_heads, outputs.shape[1]),
                lse[taken:stop].reshape(rows, q_heads),
            )
            work = work_from_proto(msg.work) if msg.HasField("work") else WorkFigures()
            results.append(AttendResult(partial, work, msg.index_kind))
        taken = stop
    return results


def _checksum(outputs: FloatArray, lse: FloatArray) -> int:
    """CRC-32 of both arrays' bytes."""
    first = zlib.crc32(np.ascontiguousarray(outputs).data)
    return zlib.crc32(np.ascontiguousarray(lse).data, first)


def node_timing_from_proto(response: retrieval_pb2.AttendResponse) -> NodeTiming:
    """Where the node's time went."""
    timing = response.timing
    return NodeTiming(
        timing.queue_us / 1e6,
        timing.search_us / 1e6,
        timing.attend_us / 1e6,
        timing.merge_us / 1e6,
    )
