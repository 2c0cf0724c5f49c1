"""Certificate files: what they must be, and how they are replaced under a running service."""

from __future__ import annotations

import datetime
import shutil
import ssl
import stat

import pytest
from cryptography import x509

from longreach.errors import FailedPrecondition, InvalidRequest
from longreach.security.authority import Authority
from longreach.security.peers import PeerIdentity, Role, ServerNames, identity_from_names
from longreach.security.tls import TlsFiles, TlsSettings, client_files, member_files

NODE_0 = PeerIdentity(Role.NODE, "node-0")


@pytest.fixture
def authority(tmp_path):
    return Authority.create(tmp_path / "pki")


def settings_of(files, **changes) -> TlsSettings:
    fields = {"tls_cert": files.certificate, "tls_key": files.key, "tls_ca": files.ca, **changes}
    return TlsSettings(**{name: str(path) for name, path in fields.items()})


def handshake(server_files, client_ca, server_name) -> dict:
    """A TLS handshake in memory by Python's own ssl module; returns the server's certificate."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(server_files.certificate, server_files.key)
    client = ssl.create_default_context(cafile=str(client_ca))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=server_name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return ends[0].getpeercert()


def test_a_certificate_names_its_member_and_no_other(authority):
    files = authority.issue(NODE_0, ["node.example.org", "10.1.2.3"])
    for name in ("node-0.node.longreach.internal", "node.longreach.internal", "node.example.org",
                 "10.1.2.3", "127.0.0.1", "localhost"):  # fmt: skip
        found = handshake(files, files.ca, name)
        assert ("URI", "longreach://node/node-0") in found["subjectAltName"]
    for name in ("node-1.node.longreach.internal", "worker.longreach.internal", "10.1.2.4"):
        with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
            handshake(files, files.ca, name)


def test_another_authoritys_certificate_is_not_trusted(authority, tmp_path):
    other = Authority.create(tmp_path / "other").issue(NODE_0)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"self-signed|unable to get"):
        handshake(other, authority.folder / "ca.crt", NODE_0.server_name)


def test_private_keys_are_for_their_owner_only(authority):
    files = authority.issue(NODE_0)
    for key in (files.key, authority.folder / "ca.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_an_authority_is_not_made_twice_and_is_found_again(authority, tmp_path):
    with pytest.raises(FailedPrecondition, match="certs issue"):
        Authority.create(authority.folder)
    files = Authority.open(authority.folder).issue(NODE_0)
    handshake(files, authority.folder / "ca.crt", NODE_0.server_name)
    with pytest.raises(InvalidRequest, match="certs init"):
        Authority.open(tmp_path / "empty")


@pytest.mark.parametrize("name", ["", "a/b", "host:7000", "-a", "a" * 64, "ä"])
def test_names_unfit_for_a_certificate_are_refused(name):
    with pytest.raises(InvalidRequest, match="cannot name a member"):
        PeerIdentity(Role.NODE, name)


def test_an_identity_is_read_from_exactly_one_name():
    assert identity_from_names(["x", "longreach://node/node-0"]) == NODE_0
    assert identity_from_names(["longreach://node/a", "longreach://worker/a"]) is None
    for name in ("longreach://king/a", "longreach://node/", "https://node/a", "longreach://node/:"):
        assert identity_from_names([name]) is None


def test_a_server_is_expected_under_the_name_the_shard_map_gave_its_address():
    names = ServerNames(Role.NODE)
    assert names("h:1") == "node.longreach.internal"
    names.learn({"node-0": "h:1", "node-1": "h:2"})
    assert names("h:1") == "node-0.node.longreach.internal"
    names.learn({"node-1": "h:1"})
    assert names("h:1") == "node-1.node.longreach.internal"


def test_a_member_is_whom_its_certificate_names(authority):
    settings = settings_of(authority.issue(NODE_0))
    assert member_files(settings, Role.NODE).identity == NODE_0
    assert member_files(settings, Role.NODE, "node-0").identity == NODE_0
    with pytest.raises(InvalidRequest, match=r"node node-0.*called 'node-7'"):
        member_files(settings, Role.NODE, "node-7")
    with pytest.raises(InvalidRequest, match="worker needs a certificate"):
        member_files(settings, Role.WORKER)


def test_no_files_mean_plain_text_and_some_files_an_error(authority):
    files = authority.issue(NODE_0)
    assert member_files(TlsSettings(), Role.NODE) is None
    assert client_files("", "", "") is None
    assert client_files("", "", str(files.ca)).current().certificate == b""
    for cert, key, ca, missing in [
        (files.certificate, files.key, "", "tls_ca"),
        (files.certificate, "", files.ca, "tls_key"),
        ("", files.key, files.ca, "tls_cert"),
    ]:
        with pytest.raises(InvalidRequest, match=f"{missing} is not set"):
            client_files(str(cert), str(key), str(ca))
    with pytest.raises(InvalidRequest, match="health_listen"):
        member_files(TlsSettings(health_listen="127.0.0.1:0"), Role.NODE)


def test_broken_files_are_named(authority, tmp_path):
    files = authority.issue(NODE_0)
    other = authority.issue(PeerIdentity(Role.NODE, "node-1"))
    junk = tmp_path / "junk"
    junk.write_text("junk")
    for changes, problem in [
        ({"tls_cert": tmp_path / "none"}, "tls_cert: cannot read"),
        ({"tls_cert": junk}, "tls_cert: .* no PEM certificate"),
        ({"tls_ca": junk}, "tls_ca: .* no PEM certificate"),
        ({"tls_key": junk}, "tls_key: .* no PEM private key"),
        ({"tls_key": other.key}, "do not belong together"),
    ]:
        with pytest.raises(InvalidRequest, match=problem):
            member_files(settings_of(files, **changes), Role.NODE)


def test_an_expired_certificate_is_refused_with_its_dates(authority):
    files = authority.issue(NODE_0, days=0)  # valid for the five minutes before now
    ended = x509.load_pem_x509_certificate(files.certificate.read_bytes()).not_valid_after_utc
    assert ended <= datetime.datetime.now(datetime.UTC)
    with pytest.raises(InvalidRequest, match=r"is valid from .* issue a new one"):
        member_files(settings_of(files), Role.NODE)


class Renewed:
    """A member's files with a clock of their own."""

    def __init__(self, authority):
        self.now = 0.0
        paths = authority.issue(NODE_0)
        self.paths = paths
        self.files = TlsFiles(
            certificate=str(paths.certificate),
            key=str(paths.key),
            ca=str(paths.ca),
            clock=lambda: self.now,
        )

    def later(self):
        self.now += 5.0
        return self.files.current()


def test_renewed_files_are_taken_without_a_restart(authority):
    member = Renewed(authority)
    first = member.later()
    authority.issue(NODE_0)
    assert member.files.current() is first  # Not looked at again yet.
    second = member.later()
    assert second.version > first.version
    assert second.certificate == member.paths.certificate.read_bytes() != first.certificate
    assert member.later() is second


def test_files_that_disagree_are_not_used_until_they_agree(authority, tmp_path):
    member = Renewed(authority)
    first = member.later()
    old_key = tmp_path / "old.key"
    shutil.copy(member.paths.key, old_key)
    authority.issue(NODE_0)
    new_key = member.paths.key.read_bytes()
    shutil.copy(old_key, member.paths.key)  # The certificate is new, the key still the old one.
    assert member.later() is first
    member.paths.key.write_bytes(new_key)
    assert member.later().key == new_key


def test_a_certificate_of_somebody_else_is_not_taken_over(authority):
    member = Renewed(authority)
    first = member.later()
    other = authority.issue(PeerIdentity(Role.NODE, "node-1"))
    shutil.copy(other.key, member.paths.key)
    shutil.copy(other.certificate, member.paths.certificate)
    assert member.later() is first


def test_files_that_vanish_leave_the_last_ones_in_use(authority):
    member = Renewed(authority)
    first = member.later()
    member.paths.certificate.unlink()
    assert member.later() is first
