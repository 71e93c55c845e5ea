"""sd_notify: tells the service manager that the daemon is ready, alive, or stopping."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable

WATCHDOG = "WATCHDOG=1"
RETRY_SECONDS = 0.1
WAIT_SECONDS = 1.0
_UNSENT_MAX = 16

_unsent: deque[str] = deque(maxlen=_UNSENT_MAX)
"""What the service manager had no room for yet; in order."""
_retrying: asyncio.AbstractEventLoop | None = None
"""The loop that sends it later."""


def notify(text: str) -> None:
    """Sends ``text`` (``READY=1`` ...) to $NOTIFY_SOCKET; does nothing without one, and nothing
    when the service manager does not listen: telling it must never stop the data path. What it has
    no room for is sent later, by the loop that runs here; where none does, there is time to wait
    for a moment. Without READY=1 it would end us."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    if text != WATCHDOG or not _unsent:
        _unsent.append(text)
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        _send(path, WAIT_SECONDS)
    else:
        _send_on(loop, path)


def _send_on(loop: asyncio.AbstractEventLoop, path: str, *, again: bool = False) -> None:
    global _retrying
    if again:
        _retrying = None
    if not _send(path, 0.0) and _retrying is not loop:
        _retrying = loop
        loop.call_later(RETRY_SECONDS, lambda: _send_on(loop, path, again=True))


def _send(path: str, seconds: float) -> bool:
    """Whether there was room, within so many seconds."""
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(seconds)
        try:
            sock.connect(address)
            while _unsent:
                sock.sendall(_unsent[0].encode())
                _unsent.popleft()
        except (BlockingIOError, TimeoutError):
            return False
        except OSError:
            _unsent.clear()
    return True


def watchdog_seconds() -> float | None:
    """How long the service manager waits for a sign of life from this process; None: it does not.

    As sd_watchdog_enabled(3): $WATCHDOG_USEC, unless $WATCHDOG_PID names another process."""
    text, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID")
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        return None
    return None if pid not in (None, str(os.getpid())) else int(text) / 1e6


async def keep_alive(
    tell: Callable[[str], None] = notify, wanted: Callable[[], bool] = lambda: True
) -> None:
    """Sends ``WATCHDOG=1`` at half of the time allowed, while ``wanted()``, until cancelled.

    It runs on the loop that serves: one that hangs falls silent, and is started again."""
    allowed = watchdog_seconds()
    while allowed is not None:
        if wanted():
            tell(WATCHDOG)
        await asyncio.sleep(allowed / 2)
