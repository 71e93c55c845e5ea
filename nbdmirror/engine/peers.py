"""Connections between nodes where nothing proves who they are: ``ports.Peers`` over plain ones.

For links that are private by themselves, and for the simulated world. Every other node gets its
``Env.peers`` from the edge.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from nbdmirror.ports import Env, Listener, Network, Peers

if TYPE_CHECKING:
    from nbdmirror.engine.link import Link
    from nbdmirror.engine.remote import Remote


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


async def connect(env: Env, remote: Remote, link: Link, seconds: float) -> None:
    """Connects to a remote in so long, unless the attempt is dropped: where nobody answers, the
    kernel tries for minutes, with pauses, and neither a command nor a remote that is back by then
    would be heard of."""
    peers, address = peers_of(env), remote.facts["address"]
    connecting = asyncio.ensure_future(peers.connect(address, remote.name, lambda: link))
    dropped = asyncio.ensure_future(remote.drop.wait())
    try:
        tasks = (connecting, dropped)
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not connecting.done():
            raise ConnectionResetError("ended to begin anew") if dropped.done() else TimeoutError
        connecting.result()
    finally:
        connecting.cancel()
        dropped.cancel()
        await asyncio.gather(connecting, dropped, return_exceptions=True)
