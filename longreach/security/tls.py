"""A member's certificate, private key and CA on disk, read again when the files change.

Rotation needs no restart: servers take the new files at the next handshake, channels at the next
call that they begin. While the files disagree (one was replaced, the other not yet) the last good
ones stay in use.
"""

from __future__ import annotations

import datetime
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from longreach.config import setting
from longreach.errors import InvalidRequest
from longreach.security.peers import PeerIdentity, Role, identity_from_names

CHECK_INTERVAL_S = 1.0
"""How often, at most, the files are looked at."""

_log = logging.getLogger(__name__)
_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class TlsSettings:
    """The settings about TLS that every service has."""

    tls_cert: str = setting(
        "", "PEM file of this member's certificate; with key and CA it turns mutual TLS on"
    )
    tls_key: str = setting("", "PEM file of the certificate's private key")
    tls_ca: str = setting("", "PEM file of the CA that signs every member's certificate")
    health_listen: str = setting(
        "",
        "host:port that answers health checks in plain text and refuses everything else, for "
        "probes that have no certificate; empty for none",
    )


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """What the files held at one time. `certificate` and `key` are empty for a client without
    one; `version` grows with every change."""

    certificate: bytes
    key: bytes
    ca: bytes
    identity: PeerIdentity | None
    version: int


class TlsFiles:
    """The files of one member or client; any thread may ask for what they hold now.

    `certificate` and `key` may both be empty for a client that only checks the server. Raises
    InvalidRequest where a file is missing, unreadable or does not belong to the others.
    """

    def __init__(
        self,
        *,
        certificate: str,
        key: str,
        ca: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = {"tls_cert": certificate, "tls_key": key, "tls_ca": ca}
        self._clock = clock
        self._lock = threading.Lock()
        self._checked_at = clock()
        self._stamp = self._stat()
        self._material = self._read(version=1)

    def current(self) -> TlsMaterial:
        """What the files hold, at most CHECK_INTERVAL_S old."""
        with self._lock:
            now = self._clock()
            if now - self._checked_at >= CHECK_INTERVAL_S:
                self._checked_at = now
                self._renew()
            return self._material

    @property
    def identity(self) -> PeerIdentity | None:
        """Whom the certificate names."""
        return self._material.identity

    def not_after_s(self) -> float:
        """When the certificate in use ends, Unix time. Only with a certificate."""
        leaf = x509.load_pem_x509_certificate(self.current().certificate)
        return leaf.not_valid_after_utc.timestamp()

    def _renew(self) -> None:
        try:
            stamp = self._stat()
            if stamp == self._stamp:
                return
            material = self._read(self._material.version + 1)
        except InvalidRequest as error:
            _log.warning("the certificate files were changed and are not used yet: %s", error)
            return
        if material.identity != self._material.identity:
            _log.warning(
                "the new certificate is that of %s, not of %s; it is not used",
                material.identity,
                self._material.identity,
            )
            return
        _log.info("the certificate files were changed and are in use now")
        self._stamp, self._material = stamp, material

    def _stat(self) -> _Stamp:
        stamps = []
        for name, path in self._paths.items():
            if path:
                try:
                    found = os.stat(path)
                except OSError as error:
                    raise _unreadable(name, path, error) from None
                stamps.append((found.st_mtime_ns, found.st_ino, found.st_size))
        return tuple(stamps)

    def _read(self, version: int) -> TlsMaterial:
        pem = {name: _read_pem(name, path) for name, path in self._paths.items()}
        identity = None
        if pem["tls_cert"]:
            identity = _check(pem, self._paths)
        _certificates(pem["tls_ca"], "tls_ca", self._paths["tls_ca"])
        return TlsMaterial(pem["tls_cert"], pem["tls_key"], pem["tls_ca"], identity, version)


def member_files(settings: TlsSettings, role: Role, member_id: str = "") -> TlsFiles | None:
    """The files a service was given; None for plain text. `member_id` may be empty.

    Raises InvalidRequest when some are missing, or the certificate names somebody else.
    """
    files = client_files(settings.tls_cert, settings.tls_key, settings.tls_ca)
    if files is None:
        if settings.health_listen:
            raise InvalidRequest(
                f"health_listen is {settings.health_listen!r} without TLS; the service's own port "
                "answers health checks then: leave it empty, or set tls_cert, tls_key and tls_ca"
            )
        return None
    identity = files.identity
    if identity is None or identity.role is not role:
        raise InvalidRequest(
            f"tls_cert {settings.tls_cert} is that of {identity or 'nobody in a cluster'}; a "
            f"{role.value} needs a certificate whose URI name is {PeerIdentity(role, 'ID').uri} "
            "with its own id (longreach certs issue makes one)"
        )
    if member_id and member_id != identity.member_id:
        raise InvalidRequest(
            f"tls_cert {settings.tls_cert} is that of {identity}, but this {role.value} is called "
            f"{member_id!r}; use the same name in both"
        )
    return files


def client_files(certificate: str, key: str, ca: str) -> TlsFiles | None:
    """Files named by settings or flags; None when there are none, for plain text.

    A client may give the CA alone. Raises InvalidRequest for other incomplete sets.
    """
    if not (certificate or key or ca):
        return None
    if not ca or bool(certificate) != bool(key):
        given = {"tls_cert": certificate, "tls_key": key, "tls_ca": ca}
        missing = [name for name, path in given.items() if not path]
        raise InvalidRequest(
            f"{' and '.join(missing)} is not set, but {', '.join(n for n in given if given[n])} "
            "is; TLS needs the certificate, its key and the CA together"
        )
    return TlsFiles(certificate=certificate, key=key, ca=ca)


def _read_pem(name: str, path: str) -> bytes:
    if not path:
        return b""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise _unreadable(name, path, error) from None


def _unreadable(name: str, path: str, error: OSError) -> InvalidRequest:
    return InvalidRequest(f"{name}: cannot read {path!r}: {error.strerror}")


def _certificates(pem: bytes, name: str, path: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise InvalidRequest(f"{name}: {path!r} holds no PEM certificate") from None


def _check(pem: dict[str, bytes], paths: dict[str, str]) -> PeerIdentity | None:
    """The identity of a certificate that is in date and belongs to its key."""
    leaf = _certificates(pem["tls_cert"], "tls_cert", paths["tls_cert"])[0]
    try:
        key = serialization.load_pem_private_key(pem["tls_key"], password=None)
    except (ValueError, TypeError):
        raise InvalidRequest(
            f"tls_key: {paths['tls_key']!r} holds no PEM private key without a passphrase"
        ) from None
    if leaf.public_key() != key.public_key():
        raise InvalidRequest(
            f"tls_cert {paths['tls_cert']} and tls_key {paths['tls_key']} do not belong together"
        )
    now = datetime.datetime.now(datetime.UTC)
    if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
        raise InvalidRequest(
            f"tls_cert {paths['tls_cert']} is valid from {leaf.not_valid_before_utc} to "
            f"{leaf.not_valid_after_utc}, and now is {now:%Y-%m-%d %H:%M:%S%z}; issue a new one, "
            "or set the clock"
        )
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    return identity_from_names(names.get_values_for_type(x509.UniformResourceIdentifier))
