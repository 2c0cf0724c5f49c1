"""`longreach certs`: certificates for mutual TLS, from a development authority."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from longreach.cli.connection import Subparsers, add_command
from longreach.security.authority import MEMBER_DAYS, Authority, MemberFiles
from longreach.security.peers import PeerIdentity, Role

_EPILOG = """\
examples:
  longreach certs init --out certs --nodes 3
  longreach certs init --out certs --nodes 3 --hosts longreach.example.org,10.0.0.5
  longreach certs issue node node-3 --dir certs        one more member
  longreach certs issue node node-0 --dir certs        renew: the running node takes it by itself

Every member and client gets DIR/ID/tls.crt, tls.key and ca.crt, the names of a Kubernetes TLS
secret: a service takes them as --tls-cert, --tls-key and --tls-ca. Keep DIR/ca.key off the
machines of the cluster. In production use your own authority with the same names in the
certificates; docs/security.md lists them.
"""


def add_parser(commands: Subparsers) -> None:
    """Adds the subcommand."""
    parser = add_command(commands, "certs", "make certificates for mutual TLS", _EPILOG)
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    init = actions.add_parser("init", help="make an authority and a certificate for each member")
    init.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    for role, count in ((Role.COORDINATOR, 1), (Role.WORKER, 1), (Role.NODE, 2)):
        init.add_argument(
            f"--{role.value}s", type=int, default=count, metavar="N",
            help=f"{role.value}s, called {role.value}-0, {role.value}-1, ... (default {count})",
        )  # fmt: skip
    _add_shared_flags(init)
    init.set_defaults(run=run_init)
    issue = actions.add_parser("issue", help="issue or renew one certificate")
    issue.add_argument("role", choices=[role.value for role in Role])
    issue.add_argument("id", metavar="ID", help="the member's name, such as node-3")
    issue.add_argument("--dir", type=Path, required=True, metavar="DIR", help="folder of init")
    _add_shared_flags(issue)
    issue.set_defaults(run=run_issue)


def _add_shared_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hosts", default="", metavar="NAME,IP,...",
        help="names and addresses by which clients outside the cluster reach the member; members "
        "need none among themselves",
    )  # fmt: skip
    parser.add_argument(
        "--days", type=int, default=MEMBER_DAYS, help="validity (default %(default)s)"
    )


def run_init(arguments: argparse.Namespace) -> int:
    """Makes the authority and the certificates, and prints where they are."""
    authority = Authority.create(arguments.out)
    for identity in _members(arguments):
        _issue(authority, identity, arguments)
    print(f"authority: {arguments.out / 'ca.crt'}; its key: {arguments.out / 'ca.key'}")
    return 0


def run_issue(arguments: argparse.Namespace) -> int:
    """Issues one certificate, in place of an older one if there is one."""
    identity = PeerIdentity(Role(arguments.role), arguments.id)
    _issue(Authority.open(arguments.dir), identity, arguments)
    return 0


def _members(arguments: argparse.Namespace) -> Iterator[PeerIdentity]:
    for role in (Role.COORDINATOR, Role.WORKER, Role.NODE):
        for number in range(getattr(arguments, f"{role.value}s")):
            yield PeerIdentity(role, f"{role.value}-{number}")
    yield PeerIdentity(Role.CLIENT, "client")


def _issue(
    authority: Authority, identity: PeerIdentity, arguments: argparse.Namespace
) -> MemberFiles:
    hosts = [host.strip() for host in arguments.hosts.split(",") if host.strip()]
    files = authority.issue(identity, hosts, days=arguments.days)
    print(f"{identity}: {files.certificate.parent}")
    return files
