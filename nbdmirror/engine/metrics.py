"""The metrics endpoint: one request, one answer, one connection (``codec.prometheus``).

Reads the node's status and nothing else. Bounded: a few connections, a short request, a deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from nbdmirror.codec import prometheus
from nbdmirror.config import Limits
from nbdmirror.engine.admission import Gate, Guest, Room

RECEIVE_BYTES = 4 << 10


class MetricsServer:
    """What all connections of the endpoint share."""

    def __init__(self, status: Callable[[], dict[str, Any]], limits: Limits, room: Room) -> None:
        self.status = status
        self.seconds = limits.handshake_seconds
        most = limits.metrics_connections_max
        self.gate = Gate(room, most, most, most)

    def connection(self) -> asyncio.BufferedProtocol:
        """The protocol for an accepted connection."""
        return MetricsConnection(self)

    def close(self) -> None:
        """Ends who is still asking."""
        for guest in list(self.gate.strangers):
            guest.end()


class MetricsConnection(asyncio.BufferedProtocol):
    """One connection: always a stranger, so the oldest goes when there are too many."""

    def __init__(self, server: MetricsServer) -> None:
        self._server = server
        self._buffer = bytearray(RECEIVE_BYTES)
        self._request = bytearray()
        self._transport: asyncio.Transport | None = None
        self._guest: Guest | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._guest = self._server.gate.enter("", self._transport.abort)
        if self._guest is None:
            self._transport.abort()
            return
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._server.seconds, self._transport.abort)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._request += memoryview(self._buffer)[:nbytes]
        if prometheus.complete(self._request):
            self._answer(prometheus.target(self._request))
        elif len(self._request) > prometheus.REQUEST_BYTES_MAX:
            self._say(431, "Request Header Fields Too Large", b"")

    def connection_lost(self, exc: BaseException | None) -> None:
        self._transport = None
        if self._deadline is not None:
            self._deadline.cancel()
        if self._guest is not None:
            self._guest.leave()

    def _answer(self, target: str | None) -> None:
        if target is None:
            self._say(405, "Method Not Allowed", b"GET /metrics\n")
        elif target != "/metrics":
            self._say(404, "Not Found", b"it is /metrics\n")
        else:
            self._say(200, "OK", prometheus.render(self._server.status()))

    def _say(self, code: int, reason: str, body: bytes) -> None:
        transport, self._transport = self._transport, None
        if transport is not None and not transport.is_closing():
            transport.pause_reading()
            transport.write(prometheus.response(code, reason, body))
            transport.close()
