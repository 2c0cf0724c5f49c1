"""Kind `auto` chooses by size and hands over the chosen kind itself."""

from __future__ import annotations

import threading

import numpy as np

from longreach.types import BFLOAT16
from retrieval_node.index.auto import EXACT_BELOW, kind_for
from retrieval_node.index.base import INDEX_KINDS, BuildControl, LayerKv


def test_short_shards_are_attended_exactly() -> None:
    assert kind_for(0) == kind_for(EXACT_BELOW - 1) == "flat"


def test_long_shards_get_a_kind_that_searches() -> None:
    assert kind_for(EXACT_BELOW) == kind_for(10_000_000) != "flat"
    assert kind_for(EXACT_BELOW) in INDEX_KINDS


def test_the_index_says_which_kind_it_is() -> None:
    keys = np.ones((1, 100, 8), BFLOAT16)
    control = BuildControl(lambda built, total: None, threading.Event())
    assert INDEX_KINDS["auto"].build(LayerKv(keys, keys, 0), None, control).kind == "flat"
