"""Waiting for a remote's answers, and saying why none comes (X3, X4)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nbdmirror.core.remotestate import Stall
from nbdmirror.engine.remote import Remote

STALL_SECONDS = 10.0
"""Without an answer for so long something is said about it."""


class Answers:
    """The answers that a resync or a verify waits for."""

    def __init__(self, remote: Remote, awaited: Callable[[], tuple[str, int]]) -> None:
        """``awaited``: what is under way, for people, and the last record that the remote has to
        apply before it can answer."""
        self._remote = remote
        self._awaited = awaited
        self._came = asyncio.Event()
        self._stalled = False
        self.stalled: Callable[[Stall | None], None] = lambda stall: None
        """Called when nothing moves any more, and with None when it does again."""

    def came(self) -> None:
        """There is one."""
        self._came.set()
        if self._stalled:
            self._stalled = False
            self.stalled(None)

    async def wait(self, ready: Callable[[], bool]) -> None:
        """Returns when an answer has made ``ready`` true."""
        while not ready():
            self._came.clear()
            try:
                async with asyncio.timeout(STALL_SECONDS):
                    await self._came.wait()
            except TimeoutError:
                if not self._stalled and not self._came.is_set():  # in this very moment
                    self._stalled = True
                    self.stalled(self._cause())

    def _cause(self) -> Stall:
        name, applied = self._remote.name, self._remote.applied_seq
        what, seq = self._awaited()
        if applied < seq:
            why = f"{what}; {name} has yet to apply {seq - applied} records"
            return Stall(why, f"nbdmirror apply thaw, on {name}, if it is frozen")
        why = f"{what}; no answer for {STALL_SECONDS:g} s: the link or the disk of {name} is slow"
        return Stall(why, f"see to the link to {name}, and to its disk")
