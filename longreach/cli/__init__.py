"""The `longreach` command: start a cluster, store documents, ask questions.

One file per subcommand; each has `add_parser` and `run`.
"""
