"""The demo model: a small Qwen3 that really retrieves over 128K tokens, and how it was made.

A request for a model of this package is followed through these files, in order:

    words.py, prose.py     the words and the text that data is made of, each with a held-out part
    tokenizer.py           builds the tokenizer from the training part
    tasks.py               facts (sentences to hide) and questions about them
    sequences.py           packs facts, filler and questions into a training batch
    primed.py              the network and its induction-primed initialisation
    optimizer.py           Muon for matrices
    train.py               the training loop:      python -m models.train --help
    export.py              to Hugging Face files:  python -m models.export --help
    haystacks.py           evaluation contexts from the held-out parts
    longcontext.py         chunked full-attention prefill and decode on a CPU
    evaluate.py            the accuracy table:     python -m models.evaluate --help
    demo/                  the trained model, its log, its table and its card

The services never import this package. The quickstart alone takes its held-out prose from here.
"""
