"""Connections between nodes where nothing proves who they are: ``ports.Peers`` over plain ones.

For links that are private by themselves, and for the simulated world. Every other node gets its
``Env.peers`` from the edge.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nbdmirror.ports import Env, Listener, Network, Peers


class OpenPeers:
    """Takes everybody's word."""

    def __init__(self, network: Network) -> None:
        self._network = network

    async def connect(
        self, address: str, node: str, protocol: Callable[[], asyncio.BufferedProtocol]
    ) -> asyncio.Transport:
        """See ``ports.Peers``; the handshake behind it compares names."""
        return await self._network.connect(address, protocol)

    async def listen(
        self, address: str, protocol: Callable[[str | None], asyncio.BufferedProtocol]
    ) -> Listener:
        """See ``ports.Peers``."""
        return await self._network.listen(address, lambda: protocol(None))

    def expires_at(self) -> float | None:
        """See ``ports.Peers``."""
        return None


def peers_of(env: Env) -> Peers:
    """How this world connects nodes."""
    return env.peers or OpenPeers(env.network)
