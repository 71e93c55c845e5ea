"""Requests of one NBD connection that wait for something: a task for each, and what it holds (I6).

Owns the tasks, and the memory that the connection's ``Holder`` is charged with for them; what a
request is and how it is answered is ``engine.export``'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from nbdmirror.codec import nbd
from nbdmirror.codec.nbd import Request
from nbdmirror.engine.budget import Holder


class Underway:
    """The tasks of one connection; ``ended`` is called behind the end of each."""

    def __init__(self, held: Holder, ended: Callable[[], None]) -> None:
        self._held = held
        self._on_end = ended
        self.tasks: dict[asyncio.Task[None], int] = {}
        """Each with the bytes that it will answer with."""
        self.reply_bytes = 0
        self._left = False

    def start(self, request: Request, work: Coroutine[Any, Any, None]) -> None:
        """Does the work for a request in a task of its own."""
        task = asyncio.ensure_future(work)
        self.tasks[task] = size = request.length if request.type == nbd.READ else 0
        if size:
            self.reply_bytes += size
            self._held.change(size)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        size = self.tasks.pop(task)
        if size:
            self.reply_bytes -= size
            if not self._left:  # else all that it held was given back
                self._held.change(-size)
        self._on_end()
        if not task.cancelled():
            task.result()

    def leave(self) -> None:
        """The client is gone: nothing is done that has not been done."""
        self._left = True
        for task in self.tasks:
            asyncio.get_running_loop().call_soon(task.cancel)  # once it has begun
        self._held.leave()
