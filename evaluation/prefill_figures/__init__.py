"""The figures that sparse prefill rests on (MInference 1.0, section 2 and 4), measured on a model.

`python -m evaluation.prefill_figures --help` runs through these files:

    prompts.py       prompts of several tasks, and every layer's queries and keys over them
    recall.py        attention mass on each row's top-k columns, and on another prompt's columns
    stability.py     the pattern nearest to dense per head, prompt by prompt
    comparison.py    patterns at equal measured cost: latency, index building, recall, error
    latency.py       attention time and density over length, beside dense
    needle.py        the needle test with sparse prefills
    plots.py         the PNG beside each report
"""
