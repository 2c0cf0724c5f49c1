"""What the span of a traced Attend request says."""

from __future__ import annotations

from longreach.telemetry.tracing import Value
from longreach.types import AttendResult, total_work
from retrieval_node.attend import Attended


def attend_attributes(layer: int, attended: Attended) -> dict[str, Value]:
    """The layer, what answered, the work of all rows together and its time, seconds."""
    answered = [each for each in attended.results if isinstance(each, AttendResult)]
    work = total_work([each.work for each in answered])
    return {
        "longreach.layer": layer,
        "longreach.rows": len(attended.results),
        "longreach.rows_failed": len(attended.results) - len(answered),
        "longreach.index.kinds": sorted({each.index_kind for each in answered}),
        "longreach.keys_in_scope": work.keys_in_scope,
        "longreach.keys_scanned": work.keys_scanned,
        "longreach.keys_sketched": work.keys_sketched,
        "longreach.keys_attended": work.keys_attended,
        "longreach.bytes_read": work.bytes_read,
        "longreach.search_s": attended.search_s,
        "longreach.attend_s": attended.attend_s,
    }
