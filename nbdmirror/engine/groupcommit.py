"""One durable write at a time, shared by all who wait for it.

Whoever asks while a commit is running waits for the next one: the running one may have begun
before the asker's data was there (O15).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class GroupCommit:
    """Runs ``commit`` for all who asked since the last one began; a failure goes to all of them."""

    def __init__(self, commit: Callable[[], Awaitable[None]]) -> None:
        self._commit = commit
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    async def __call__(self) -> None:
        """Returns when a commit that began after this call has ended; raises what it raised."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._run_after(self._running))
            # Askers may all be cancelled; what failed once fails for the next one too.
            self._next.add_done_callback(lambda done: done.cancelled() or done.exception())
        # The commit outlives an asker that is cancelled: others wait for it too.
        await asyncio.shield(self._next)

    async def _run_after(self, previous: asyncio.Task[None] | None) -> None:
        if previous is not None:
            await asyncio.wait([previous])
        self._running, self._next = self._next, None
        await self._commit()
