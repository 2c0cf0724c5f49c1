"""MInference's kernel-aware offline search (1.0, section 3.2): a pattern for every query head.

Candidates of the published space are sized until they cost the same on this machine, measured, and
the one whose output over a calibration prompt is nearest to dense attention's serves the head.

    space.py      the candidates, and their sizes on other prompts
    capture.py    queries, keys and values of one layer after another, from a dense prefill
    measuring.py  what a pattern costs on a layer, and each head's error
    sizing.py     a candidate's sizes at the target cost
    search.py     all layers, resumable
    document.py   the JSON files
"""

from gpu_worker.pattern_search.search import SearchConfig, Stage, search

__all__ = ["SearchConfig", "Stage", "search"]
