"""sd_notify: tells the service manager that the daemon is ready, alive, or stopping."""

from __future__ import annotations

import os
import socket


def notify(text: str) -> None:
    """Sends ``text`` (``READY=1`` ...) to $NOTIFY_SOCKET; does nothing without one."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect(address)
        sock.sendall(text.encode())
