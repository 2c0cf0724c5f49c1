"""Clients of longreach's services, and what their servers share: options, errors, health."""
