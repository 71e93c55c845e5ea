"""Signals of a process with a node in it, or with one below it.

A stop that is under way is a clean one, however often one asks for it: a service manager tells
every process of a service, a supervisor hands on what it was told, and a person presses Ctrl-C
again. So from the end of the work on they mean nothing. Python's own handlers do this, not those of
the event loop: a loop that closes gives a signal its deadly meaning back, and so does a Python
that is finalised, but for one that is ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator

STOP = (signal.SIGTERM, signal.SIGINT)
HANDLED = (*STOP, signal.SIGHUP)


@contextlib.contextmanager
def handled(stop: Callable[[], object], reload: Callable[[], object]) -> Iterator[None]:
    """Within, on the running loop of the main thread: SIGTERM and SIGINT have it call ``stop``,
    SIGHUP ``reload``; behind it they are ignored."""
    loop = asyncio.get_running_loop()
    for number in HANDLED:
        action = stop if number in STOP else reload
        signal.signal(number, lambda *_, action=action: loop.call_soon_threadsafe(action))
    try:
        yield
    finally:
        ignore()


def ignore() -> None:
    """For good; in the main thread."""
    for number in HANDLED:
        signal.signal(number, signal.SIG_IGN)
