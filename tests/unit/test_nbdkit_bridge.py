"""The hand-over from nbdkit's threads to the node's loop, without nbdkit."""

from __future__ import annotations

import asyncio
import errno
import threading
from typing import Any

from nbdmirror.edge.nbdkit_bridge import Bridge, Client
from nbdmirror.errors import VolumeFailed


def test_a_request_that_is_cancelled_before_it_begins_is_answered() -> None:
    """At a stop that waits no longer: nbdkit's thread would keep nbdkit, and the node, for ever."""
    bridge = Bridge.__new__(Bridge)
    bridge.waiting, bridge.closed, bridge._tasks = {}, False, {}
    answers: list[Any] = []

    async def never() -> None:
        raise AssertionError("it was cancelled before")

    def request() -> None:
        try:
            Client(bridge).call(never)
        except VolumeFailed as error:
            answers.append(error.errno)

    def create(loop: asyncio.AbstractEventLoop, work: Any, **how: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(work, loop=loop, **how)
        if work.__name__ == "never":
            task.cancel()
        return task

    async def play() -> None:
        bridge.loop = asyncio.get_running_loop()
        bridge.loop.set_task_factory(create)
        thread = threading.Thread(target=request, daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, 10)

    asyncio.run(play())
    assert answers == [errno.ESHUTDOWN]
