"""How the workers of one server get their connections from one address."""

from __future__ import annotations

from enum import StrEnum

from prefork.net.address import Address, TCPAddress, UDPAddress


class Sharing(StrEnum):
    """What the workers share of a listener."""

    INHERIT = "inherit"  # one socket, inherited by all; whoever is awake accepts
    REUSEPORT = "reuseport"  # one socket per slot, the kernel spreads connections by their hash
    HANDOFF = "handoff"  # one socket that only the master accepts from, and sends connections on


def effective_sharing(sharing: Sharing, address: Address) -> Sharing:
    """*sharing*, or what stands in for it where *address* cannot have it.

    SO_REUSEPORT spreads nothing on a unix socket, and a descriptor we were given is one socket. Datagrams
    have no connections that could be handed over.
    """
    if isinstance(address, UDPAddress):
        return Sharing.INHERIT
    if sharing is Sharing.REUSEPORT and not isinstance(address, TCPAddress):
        return Sharing.INHERIT
    return sharing
