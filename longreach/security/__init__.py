"""Who may do what: certificates between members, capabilities for what is stored.

peers        the names that certificates carry: role and member id
tls          a member's certificate files, read again when they change
authority    a development CA (`longreach certs`)
capability   what the coordinator lets a worker do on a node
"""

from longreach.security.capability import Capability, sign, verify
from longreach.security.peers import PeerIdentity, Role
from longreach.security.tls import TlsFiles, TlsSettings

__all__ = ["Capability", "PeerIdentity", "Role", "TlsFiles", "TlsSettings", "sign", "verify"]
