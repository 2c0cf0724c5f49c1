"""How well a method answers over long contexts, always beside full attention on the same samples.

A run (`longreach eval --help`) goes through these files, in order:

    command.py, defaults.py the flags' meaning, and what is run where they say nothing
    encoding.py             the model's tokenizer
    tasks/base.py           what a task and a sample are; the registry of tasks
    tasks/draft.py          sizes a sample to an exact number of the model's own tokens
    tasks/haystack.py       the text that needles hide in
    tasks/ruler_*.py        RULER (arXiv 2404.06654)
    tasks/infinitebench*.py InfiniteBench (arXiv 2402.13718)
    tasks/needle.py         one needle over lengths and depths: the heatmap
    tasks/mixed.py          one haystack, many questions of mixed tasks
    methods.py, local.py    what `--methods` names: full attention, a cluster, methods in process
    answering.py            prefills a context and answers questions over it
    runner.py               asks every method every sample; results.py keeps each answer at once
    scorers.py              the benchmarks' published rules
    pairing.py, statistics.py  paired comparison with full attention, with intervals
    report.py, targets.py   figures and claims, as JSON; roles.py says what a method is
    diffuse.py              every method on a head that a hundred keys do not carry
    tables.py, plots.py     Markdown, heatmap and curves
    page.py, published.py   the page of results, with the papers' figures beside ours
"""
