"""Retrieval node: stores offloaded KV, indexes it and answers partial attention. No torch here."""
