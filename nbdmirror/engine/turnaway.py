"""What a primary answers to those who want to replicate to it: no, and why (T13, I5).

It listens wherever a secondary would: an address that is silent, or a socket that a service manager
holds and nobody accepts from, looks like a link that is slow to come. Nothing that is said here
reaches the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nbdmirror.codec.repl import Frame, Type
from nbdmirror.config import Limits
from nbdmirror.engine.link import Link
from nbdmirror.errors import PeerError

RULE = "T13"


class TurnedAway:
    """One connection from somebody who takes this node for a secondary."""

    def __init__(self, node: str, limits: Limits, refused: Callable[[str], None]) -> None:
        """``refused`` is told why, once."""
        self._why = f"{node} is a primary, and takes no replication"
        self._seconds = limits.handshake_seconds
        self._refused = refused
        self.link = Link(self._on_frame, limits)
        self.link.begin(started=False)

    def _on_frame(self, frame: Frame) -> None:
        if frame.type is not Type.HELLO:
            raise PeerError(f"{frame.type.name} came instead of HELLO")
        self.link.session = frame.session
        self.link.send_json(Type.REFUSE, {"rule": RULE, "why": self._why})
        self.link.close(PeerError(self._why), flush=True)

    async def run(self) -> None:
        """Returns when the connection is over; it has as long as a handshake."""
        try:
            async with asyncio.timeout(self._seconds):
                await self.link.closed.wait()
        except TimeoutError:
            self.link.close(PeerError(f"too slow: no HELLO within {self._seconds:g} s"))
        finally:
            self.link.close()
        self._refused(str(self.link.cause))
