"""Which client may attach which export: the rules of ``[[volume]]``, asked for by name.

Decides only; who a client is was found out before (its certificate, its address). Deny by default:
where a rule names who may come, nobody else may. An address is compared as a number within a
network, never as text, and proves little: it narrows, it does not authenticate. Clients of a unix
socket have neither name nor address: whom its mode lets in, the host's owner has let in.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from nbdmirror.config import AccessConfig

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Client:
    """Who is at the other end: the IP address (None: a unix socket), the names it proved."""

    address: str | None = None
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = self.address or "a unix socket"
        return f"{', '.join(self.names)} at {where}" if self.names else where


class Rules:
    """The rules of one volume."""

    def __init__(self, config: AccessConfig) -> None:
        self.read_only = config.read_only
        self._names = config.names
        self._clients_max = config.connections_max
        self._networks: list[Network] | None = None
        if config.addresses is not None:
            self._networks = [ipaddress.ip_network(text) for text in config.addresses]

    def refusal(self, client: Client, clients: int) -> str | None:
        """Why this client may not attach the volume, which has so many already; None if it may."""
        if client.address is not None:
            if self._names is not None and not any(name in self._names for name in client.names):
                return f"wrong name: {client} is not one of the clients that this export is for"
            if self._networks is not None:
                address = _plain(client.address)
                if not any(address in network for network in self._networks):
                    return f"{client} is not at an address that this export is for"
        if self._clients_max is not None and clients >= self._clients_max:
            return f"this export has its {self._clients_max} clients already"
        return None


OPEN = Rules(AccessConfig())


def _plain(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
