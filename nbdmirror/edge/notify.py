"""sd_notify: tells the service manager that the daemon is ready, alive, or stopping."""

from __future__ import annotations

import contextlib
import os
import socket


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
