"""Settings of the HTTP gateway; without `http_listen` there is none."""

from __future__ import annotations

from dataclasses import dataclass

from longreach.config import setting


@dataclass(frozen=True)
class GatewaySettings:
    """Where the OpenAI-compatible API answers, and whom."""

    http_listen: str = setting(
        "",
        "host:port of the OpenAI-compatible HTTP API (HTTPS where TLS is on); empty for none.",
    )
    api_keys_file: str = setting(
        "",
        "File of API keys, one a line (# begins a comment), read again when it changes. Whoever "
        "calls the public API, HTTP or gRPC, then needs one; empty asks nobody.",
    )
    chat_template: str = setting(
        "",
        "File of a chat template (Jinja) in place of the model's own, for models without one.",
    )
