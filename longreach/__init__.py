"""longreach: serve long-context language models whose KV cache does not fit the GPU."""

__version__ = "0.1.0"
