"""Who hangs up while nothing is read from it: an event loop only sees that where it reads.

One epoll for all connections, which wakes for an end and for nothing else, however much lies
unread; the loop watches that. It is there while there is a connection to watch.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
from collections.abc import Callable


class Hangups:
    """The watched connections of one event loop."""

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self._watched: dict[int, Callable[[], object]] = {}

    def watch(
        self, transport: asyncio.BaseTransport, gone: Callable[[], object]
    ) -> Callable[[], None]:
        """See ``ports.Network``."""
        fd = transport.get_extra_info("socket").fileno()
        if self._epoll is None:
            self._epoll = select.epoll()
            asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._look)
        self._epoll.register(fd, select.EPOLLRDHUP | select.EPOLLONESHOT)
        self._watched[fd] = gone

        def end() -> None:
            if self._watched.get(fd) is gone:  # else its number is another's by now
                del self._watched[fd]
                self._forget(fd)

        return end

    def _look(self) -> None:
        assert self._epoll is not None
        loop = asyncio.get_running_loop()
        for fd, _ in self._epoll.poll(0):
            if fd in self._watched:  # each by itself: none is told of twice
                loop.call_soon(self._tell, fd, self._watched[fd])

    def _tell(self, fd: int, gone: Callable[[], object]) -> None:
        if self._watched.get(fd) is gone:
            gone()

    def _forget(self, fd: int) -> None:
        assert self._epoll is not None
        with contextlib.suppress(OSError):  # closed already: the kernel has forgotten it
            self._epoll.unregister(fd)
        if not self._watched:
            asyncio.get_running_loop().remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None
