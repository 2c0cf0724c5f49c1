"""The observations that longreach rests on, measured: each a command with a plot.

Attention over long contexts is sparse, which keys matter changes from step to step, and queries lie
outside the distribution of the keys they search. `python -m evaluation.observations --help` runs
through these files:

    dump.py          a model's keys, values and queries over a text, as files (dump_files.py)
    heads.py         the heads to measure: synthetic ones or a dump's
    sparsity.py      attention mass and output error when only the top-k keys are kept
    dynamics.py      keys chosen per step against keys chosen once from the prompt
    ood.py           distance of queries to the keys (mahalanobis.py), and recall against keys read
                     for searches by queries and by keys (searches.py)
    reporting.py     JSON, CSV and tables of every command
    plots.py         the PNG beside them
"""
