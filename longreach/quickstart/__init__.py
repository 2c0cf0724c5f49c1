"""A tour of the system on one machine: `python -m longreach.quickstart`.

Starts a cluster, stores a document of more than 100,000 tokens with facts hidden in it, asks for
the facts and reports what answering took.
"""
