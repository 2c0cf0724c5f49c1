"""Coordinator: public API, contexts, sessions, the decode loop, membership and placement. No torch."""
