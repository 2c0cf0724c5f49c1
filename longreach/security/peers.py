"""The names that certificates carry.

A member's certificate names it twice among its subject alternative names: by a URI,
`longreach://node/node-3`, which servers read to know who calls, and by DNS names below
`longreach.internal`, which clients check to know whom they reached. No resolver knows these names
and none is asked: connections go to the addresses that membership tells, and the certificate alone
says who answers there.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from longreach.errors import InvalidRequest

SCHEME = "longreach"
DOMAIN = "longreach.internal"
_MEMBER_ID = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


class Role(enum.Enum):
    """What a certificate's owner is; a client is a person or a program outside the cluster."""

    COORDINATOR = "coordinator"
    WORKER = "worker"
    NODE = "node"
    CLIENT = "client"

    @property
    def server_name(self) -> str:
        """The DNS name that every certificate of this role carries."""
        return f"{self.value}.{DOMAIN}"


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """A role and the name of one member in it. Raises InvalidRequest for names unfit for DNS."""

    role: Role
    member_id: str

    def __post_init__(self) -> None:
        if not _MEMBER_ID.fullmatch(self.member_id):
            raise InvalidRequest(
                f"{self.member_id!r} cannot name a member in a certificate: use at most 63 "
                "letters, digits, dots, hyphens and underscores, a letter or digit at both ends"
            )

    @property
    def uri(self) -> str:
        """The URI subject alternative name."""
        return f"{SCHEME}://{self.role.value}/{self.member_id}"

    @property
    def server_name(self) -> str:
        """The DNS name that only this member's certificate carries."""
        return f"{self.member_id}.{self.role.server_name}"

    def __str__(self) -> str:
        return f"{self.role.value} {self.member_id}"


class ServerNames:
    """Which name a certificate must carry at an address, for members of one role.

    Learned from shard maps. An address that none has named may be answered by any of the role.
    """

    def __init__(self, role: Role) -> None:
        self._role = role
        self._ids: dict[str, str] = {}

    def learn(self, addresses: Mapping[str, str]) -> None:
        """Takes host:port by member id; the latest news about an address counts."""
        for member_id, address in addresses.items():
            self._ids[address] = member_id

    def __call__(self, address: str) -> str:
        """The name for a host:port; raises InvalidRequest for an id that no certificate has."""
        member_id = self._ids.get(address)
        if member_id is None:
            return self._role.server_name
        return PeerIdentity(self._role, member_id).server_name


def identity_from_names(names: Iterable[str]) -> PeerIdentity | None:
    """The identity among a certificate's alternative names; None when none or several are."""
    found = {identity for name in names if (identity := _parse(name)) is not None}
    return found.pop() if len(found) == 1 else None


def _parse(name: str) -> PeerIdentity | None:
    match = re.fullmatch(rf"{SCHEME}://([a-z]+)/(.+)", name)
    if match is None:
        return None
    try:
        return PeerIdentity(Role(match.group(1)), match.group(2))
    except (ValueError, InvalidRequest):
        return None
