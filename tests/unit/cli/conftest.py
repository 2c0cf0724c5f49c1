"""A server that plays a script."""

from tests.scripted_generation import address, service

__all__ = ["address", "service"]
