"""Kind `flat`: reads every key of the scope; the exact answer to every budget.

It needs no build, so a shard answers with it as soon as it is sealed. With an exact budget, K and V
stream through one pass of flash-style attention; with any other, keys are scored, the budget keeps
some of them, and their values are gathered: the exact k nearest neighbours that the other kinds
approximate.
"""

from __future__ import annotations

from typing import ClassVar

from longreach.types import QuerySample
from retrieval_node import kernel
from retrieval_node.index.base import (
    INDEX_KINDS,
    BuildControl,
    LayerKv,
)
from retrieval_node.index.kernel_index import KernelIndex


@INDEX_KINDS.register("flat")
class FlatIndex(KernelIndex):
    """Exact attention, or the exact best keys under a budget."""

    kind: ClassVar[str] = "flat"
    needs_build: ClassVar[bool] = False

    @classmethod
    def build(cls, kv: LayerKv, sample: QuerySample | None, control: BuildControl) -> FlatIndex:
        """At once; the sample is not used."""
        control.progress(kv.kv_heads, kv.kv_heads)
        return cls(kv)

    @property
    def index_bytes(self) -> int:
        """Nothing beside K and V."""
        return 0

    def attend_entries(
        self, entries: list[kernel.Entry], scale: float, softcap: float, want_selected: bool
    ) -> kernel.Results:
        """See KernelIndex.attend_entries."""
        keys, values = self._kv.keys, self._kv.values
        return kernel.attend_scope(keys, values, entries, scale, softcap, want_selected)
