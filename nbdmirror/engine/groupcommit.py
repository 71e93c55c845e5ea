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
        self._task: asyncio.Task[None] | None = None
        self._asking: list[asyncio.Future[None]] = []
        """Those for whom the next commit will be."""

    async def __call__(self) -> None:
        """Returns when a commit that began after this call has ended; raises what it raised."""
        waiter = asyncio.get_running_loop().create_future()
        self._asking.append(waiter)
        if self._task is None:
            # A task of its own: it outlives an asker that is cancelled, others wait for it too.
            self._task = asyncio.ensure_future(self._run())
        await waiter

    async def _run(self) -> None:
        waiters: list[asyncio.Future[None]] = []
        try:
            while self._asking:
                waiters, self._asking = self._asking, []
                try:
                    await self._commit()
                except Exception as error:
                    for waiter in waiters:
                        if not waiter.done():  # else its asker was cancelled
                            waiter.set_exception(error)
                else:
                    for waiter in waiters:
                        if not waiter.done():
                            waiter.set_result(None)
        finally:
            self._task = None
            # Nobody is left waiting but when this very task is cancelled: the process ends.
            for waiter in waiters + self._asking:
                waiter.cancel()
