"""Certificates for tests."""

from __future__ import annotations

from pathlib import Path

from longreach.security.authority import Authority
from longreach.security.peers import PeerIdentity, Role
from longreach.security.tls import TlsFiles


def issued(
    authority: Authority, role: Role, member_id: str, *, clock=None, days: int = 1
) -> TlsFiles:
    """A member's certificate, as the member reads it; without `clock` files are checked always."""
    files = authority.issue(PeerIdentity(role, member_id), days=days)
    ticks = iter(range(10**9))
    return TlsFiles(
        certificate=str(files.certificate),
        key=str(files.key),
        ca=str(files.ca),
        clock=clock or (lambda: 10.0 * next(ticks)),
    )


def replace_trust(folder: Path, authority: Authority) -> None:
    """Makes the files of a member those of another authority with the same name."""
    identity = PeerIdentity(Role(folder.name.rpartition("-")[0]), folder.name)
    new = authority.issue(identity)
    for name in ("ca.crt", "tls.key", "tls.crt"):
        (folder / name).write_bytes((new.certificate.parent / name).read_bytes())
