"""`longreach certs`: what it writes is what services accept."""

from __future__ import annotations

import pytest

from longreach.cli.__main__ import EXIT_FAILED, EXIT_USAGE, main
from longreach.security.peers import Role
from longreach.security.tls import TlsSettings, member_files


def settings(folder):
    return TlsSettings(
        tls_cert=str(folder / "tls.crt"),
        tls_key=str(folder / "tls.key"),
        tls_ca=str(folder / "ca.crt"),
    )


def test_init_makes_a_certificate_for_every_member(tmp_path, capsys):
    out = tmp_path / "certs"
    assert main(["certs", "init", "--out", str(out), "--nodes", "3", "--hosts", "a.example"]) == 0
    made = {path.parent.name for path in out.glob("*/tls.crt")}
    assert made == {"coordinator-0", "worker-0", "node-0", "node-1", "node-2", "client"}
    for name in made:
        role = Role(name.partition("-")[0])
        assert str(member_files(settings(out / name), role).identity) == f"{role.value} {name}"
    assert str(out / "node-2") in capsys.readouterr().out


def test_issue_adds_and_renews(tmp_path):
    out = tmp_path / "certs"
    assert main(["certs", "init", "--out", str(out)]) == 0
    assert main(["certs", "issue", "node", "node-7", "--dir", str(out)]) == 0
    before = (out / "node-7" / "tls.crt").read_bytes()
    assert main(["certs", "issue", "node", "node-7", "--dir", str(out)]) == 0
    assert (out / "node-7" / "tls.crt").read_bytes() != before
    assert member_files(settings(out / "node-7"), Role.NODE, "node-7") is not None


@pytest.mark.parametrize(
    ("arguments", "status", "problem"),
    [
        (["issue", "node", "node-0", "--dir", "{empty}"], EXIT_USAGE, "certs init"),
        (["issue", "node", "a:b", "--dir", "{made}"], EXIT_USAGE, "cannot name a member"),
        (["init", "--out", "{made}"], EXIT_FAILED, "holds a certificate authority"),
        (["issue", "node", "x", "--dir", "{made}", "--hosts", "ä b"], EXIT_USAGE, "DNS name"),
    ],
)
def test_wrong_use_says_the_way_out(arguments, status, problem, tmp_path, capsys):
    made = tmp_path / "made"
    assert main(["certs", "init", "--out", str(made)]) == 0
    places = {"{empty}": str(tmp_path / "empty"), "{made}": str(made)}
    assert main(["certs", *(places.get(each, each) for each in arguments)]) == status
    assert problem in capsys.readouterr().err
