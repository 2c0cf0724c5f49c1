"""How well a method answers over long contexts, always beside full attention on the same samples.

A run (`python -m evaluation --help`) goes through these files, in order:

    encoding.py            the model's tokenizer
    tasks/base.py          what a task and a sample are; the registry of tasks
    tasks/draft.py         sizes a sample to an exact number of the model's own tokens
    tasks/haystack.py      the text that needles hide in
    tasks/ruler_*.py       RULER (arXiv 2404.06654)
    tasks/infinitebench*.py InfiniteBench (arXiv 2402.13718)
    tasks/needle.py        one needle over lengths and depths: the heatmap
    tasks/mixed.py         one haystack, many questions of mixed tasks
    methods.py             what `--methods` names: full attention, a cluster and its budget
    answering.py           prefills a context and answers questions over it
    runner.py              asks every method every sample; results.py keeps each answer at once
    scorers.py             the benchmarks' published rules
    statistics.py          paired comparison with full attention, with intervals
    report.py              figures and targets, as JSON
    tables.py, plots.py    Markdown, heatmap and curves
"""
