"""The time between an NBD client's connection and its choice of an export.

Who it is, its place at the gate, its deadline, TLS where that is asked for, and what it may see:
until the choice is made nothing else of the engine is touched. ``engine.export`` makes one for each
connection and asks it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from nbdmirror.codec.nbd import ExportInfo
from nbdmirror.codec.nbdhandshake import Forbidden
from nbdmirror.engine.access import Client
from nbdmirror.engine.admission import Guest, address_of
from nbdmirror.ports import TlsServer

if TYPE_CHECKING:
    from nbdmirror.engine.export import ExportServer


class Arrival:
    """One client on its way in; ``end`` closes its connection at once."""

    def __init__(
        self, server: ExportServer, tls: TlsServer | None, end: Callable[[], None]
    ) -> None:
        self._server = server
        self._end = end
        self.tls = tls
        self.client = Client()
        self._guest: Guest | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._upgrade: asyncio.Task[None] | None = None

    def admit(self, transport: asyncio.Transport) -> bool:
        """Takes a place at the gate, and starts the clock; False: there is no place."""
        server = self._server
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple) and peer:
            self.client = Client(str(peer[0]))
        if not server.stopping:
            self._guest = server.gate.enter(address_of(transport), self._end)
        if self._guest is None:
            return False
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(server.limits.handshake_seconds, self._too_slow)
        return True

    def _too_slow(self) -> None:
        seconds = self._server.limits.handshake_seconds
        self.refused(f"too slow: no export was chosen within {seconds:g} s")
        self.leave()
        self._end()

    def refused(self, why: str) -> None:
        """Tells of it: the client is, or soon will be, sent away."""
        self._server.refused("nbd", str(self.client), why)

    def find(self, name: str) -> ExportInfo | Forbidden | None:
        """The export of that name, as this client finds it."""
        found = self._server.find_for(self.client, name)
        if isinstance(found, Forbidden):
            self.refused(f"{name!r}: {found.why}")
        return found

    def exports(self) -> list[ExportInfo]:
        """What this client may attach."""
        return self._server.exports_for(self.client)

    def secure(
        self,
        plain: asyncio.Transport,
        protocol: asyncio.BufferedProtocol,
        secured: Callable[[asyncio.Transport], None],
    ) -> None:
        """Hands the connection to TLS; nothing more is read in plain text. ``secured`` gets the
        transport to go on with, before the first bytes from it reach ``protocol``."""
        plain.pause_reading()
        self._upgrade = asyncio.ensure_future(self._secure(plain, protocol, secured))

    async def _secure(
        self,
        plain: asyncio.Transport,
        protocol: asyncio.BufferedProtocol,
        secured: Callable[[asyncio.Transport], None],
    ) -> None:
        assert self.tls is not None and self._guest is not None
        try:
            transport, names = await self.tls.secure(plain, protocol)
        except OSError as error:
            if self._guest.inside:  # else it was sent away, and that was told
                self.refused(f"tls: {error}")
            plain.abort()
            protocol.connection_lost(error)  # which TLS does not tell where it had not begun
            return
        self.client = replace(self.client, names=names)
        secured(transport)

    def chosen(self) -> None:
        """The client has its export: it is no stranger any more."""
        assert self._guest is not None and self._deadline is not None
        self._guest.known()
        self._deadline.cancel()

    def leave(self) -> None:
        """The connection is over."""
        if self._guest is not None:
            self._guest.leave()
        if self._deadline is not None:
            self._deadline.cancel()
