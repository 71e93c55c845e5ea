"""sd_notify: tells the service manager that the daemon is ready, alive, or stopping."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable

WATCHDOG = "WATCHDOG=1"


def notify(text: str) -> None:
    """Sends ``text`` (``READY=1`` ...) to $NOTIFY_SOCKET; does nothing without one, and nothing
    when the service manager does not listen: telling it must never stop the data path."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    with socket.socket(socket.AF_UNIX, kind) as sock, contextlib.suppress(OSError):
        sock.connect(address)
        sock.sendall(text.encode())


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
