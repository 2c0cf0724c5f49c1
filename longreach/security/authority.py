"""A certificate authority for development and tests: ECDSA P-256 keys, X.509 v3 certificates.

In production let your own authority (cert-manager, SPIRE, Vault) issue certificates with the names
of `longreach.security.peers`. File names are those of a Kubernetes TLS secret.

    DIR/ca.crt  DIR/ca.key  DIR/MEMBER/{tls.crt,tls.key,ca.crt}
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from longreach.errors import FailedPrecondition, InvalidRequest
from longreach.security.peers import PeerIdentity

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Hosts that every certificate names, so that tools on the same machine reach a service."""

CA_DAYS = 3650
MEMBER_DAYS = 365
# Machines' clocks differ; a certificate made a moment ago must be valid on all of them.
_BACKDATED = datetime.timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class MemberFiles:
    """Where a member's certificate, key and CA lie."""

    certificate: Path
    key: Path
    ca: Path


class Authority:
    """The authority in `folder`: `create` makes it, `open` finds it."""

    def __init__(
        self, folder: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
    ) -> None:
        self.folder = folder
        self._certificate = certificate
        self._key = key

    @staticmethod
    def create(folder: Path, *, days: int = CA_DAYS) -> Authority:
        """A new authority; raises FailedPrecondition where there is one."""
        if (folder / "ca.key").exists():
            raise FailedPrecondition(
                f"{folder} holds a certificate authority; issue more certificates with "
                "`longreach certs issue`, or choose another --out"
            )
        folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "longreach development CA")])
        certificate = (
            _builder(name, name, key.public_key(), days)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        _write(folder / "ca.crt", _pem(certificate), mode=0o644)
        _write(folder / "ca.key", _key_pem(key), mode=0o600)
        return Authority(folder, certificate, key)

    @staticmethod
    def open(folder: Path) -> Authority:
        """The authority that `create` made there; raises InvalidRequest without one."""
        try:
            certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
            key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
        except (OSError, ValueError) as error:
            raise InvalidRequest(
                f"no certificate authority in {folder} ({error}); `longreach certs init --out "
                f"{folder}` makes one"
            ) from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise InvalidRequest(f"{folder / 'ca.key'} is not an ECDSA key, which certs init makes")
        return Authority(folder, certificate, key)

    def issue(
        self, identity: PeerIdentity, hosts: Sequence[str] = (), *, days: int = MEMBER_DAYS
    ) -> MemberFiles:
        """Issues or renews a member's certificate, with a new key.

        `hosts` are DNS names and IP addresses that clients outside the cluster reach it by.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.member_id)])
        certificate = (
            _builder(name, self._certificate.subject, key.public_key(), days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage(
                    [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
                ),
                critical=False,
            )
            .add_extension(_names(identity, hosts), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._certificate.public_key()),  # type: ignore[arg-type]
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        files = self.files(identity.member_id)
        files.certificate.parent.mkdir(parents=True, exist_ok=True)
        _write(files.ca, _pem(self._certificate), mode=0o644)
        _write(files.key, _key_pem(key), mode=0o600)
        _write(files.certificate, _pem(certificate), mode=0o644)
        return files

    def files(self, member_id: str) -> MemberFiles:
        """Where the files of a member are, issued or not."""
        folder = self.folder / member_id
        return MemberFiles(folder / "tls.crt", folder / "tls.key", folder / "ca.crt")


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _names(identity: PeerIdentity, hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName(
        [
            x509.UniformResourceIdentifier(identity.uri),
            x509.DNSName(identity.server_name),
            x509.DNSName(identity.role.server_name),
            *(_host(each) for each in dict.fromkeys((*LOOPBACK, *hosts))),
        ]
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise InvalidRequest(f"{host!r} is neither an IP address nor a DNS name") from None


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write(path: Path, content: bytes, *, mode: int) -> None:
    """Replaces a file in one step, readable for others only where `mode` says so from the start."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
    part.replace(path)
