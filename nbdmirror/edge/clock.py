"""The wall clock and the identity of the running boot.

Owns nothing that logic may depend on: order and timeouts come from the event loop. The daemon
makes one and hands it to the engine in ``Env``.
"""

from __future__ import annotations

import time

BOOT_ID_PATH = "/proc/sys/kernel/random/boot_id"


class LinuxClock:
    """``ports.Clock``: time since 1970 in nanoseconds, and the kernel's boot id."""

    def __init__(self) -> None:
        with open(BOOT_ID_PATH, encoding="ascii") as file:
            self._boot_id = file.read().strip()

    def time_ns(self) -> int:
        """Nanoseconds since 1970; may step in either direction."""
        return time.time_ns()

    def monotonic_ns(self) -> int:
        """CLOCK_MONOTONIC, to the nanosecond; the event loop's own time has only milliseconds."""
        return time.monotonic_ns()

    def boot_id(self) -> str:
        """A uuid that the kernel draws once per boot."""
        return self._boot_id
