"""Coordinator: public API, contexts, sessions, the decode loop, membership, placement. No torch."""
