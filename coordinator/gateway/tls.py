"""HTTPS with the coordinator's own certificate, renewed when its files change."""

from __future__ import annotations

import ssl

from longreach.security.tls import TlsFiles, TlsSettings


def https_context(settings: TlsSettings, files: TlsFiles) -> ssl.SSLContext:
    """A server's context that asks clients for no certificate: API keys say who they are.

    Every handshake gets the certificate that the files hold then.
    """
    current = _loaded(settings)
    version = files.current().version

    def choose(connection: ssl.SSLObject, name: str | None, given: ssl.SSLContext) -> None:
        nonlocal current, version
        now = files.current().version
        if now != version:
            current, version = _loaded(settings), now
        connection.context = current

    front = _loaded(settings)
    front.sni_callback = choose
    return front


def _loaded(settings: TlsSettings) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(settings.tls_cert, settings.tls_key)
    return context
