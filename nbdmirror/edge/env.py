"""The real world, put together for a node: disk, network, clock, randomness."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import socket
import struct
import traceback
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvloop

from nbdmirror.edge.clock import LinuxClock
from nbdmirror.edge.files import LinuxDisk
from nbdmirror.edge.journal import JOURNAL, LogHandler
from nbdmirror.edge.net import LinuxNetwork
from nbdmirror.errors import NbdmirrorError, UsageError, os_error_text
from nbdmirror.ports import Env

T = TypeVar("T")
_PEERCRED = struct.Struct("3i")

EXIT_MISTAKE = 70
"""Exit code of a daemon that ended over a mistake of its own (EX_SOFTWARE): recovery at the next
start mends that, so a service manager may start it again; not after 1, 2 and 4."""


def real_env(network: LinuxNetwork | None = None) -> Env:
    """This machine, as the engine sees it."""
    return Env(LinuxDisk(), network or LinuxNetwork(), LinuxClock(), random.SystemRandom())


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs the coroutine on a fresh uvloop, whose log goes to the journal. Refuses ``python -O``:
    asserts are part of the product."""
    if not __debug__:
        work.close()
        raise UsageError("nbdmirror does not run with python -O: its checks must stay on")
    logging.basicConfig(handlers=[LogHandler(JOURNAL)], format="%(message)s")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def hold_standard_streams() -> None:
    """Opens /dev/null in the place of each of the three that the caller has closed: else the next
    file that is opened is there, and lines for the journal go into it. Programs that we start have
    it as well: nbdkit refuses to run without the three."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free


def settle_garbage() -> None:
    """Keeps the collector off the data path: what exists now stays, and full collections are
    rare. The data path makes no reference cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 1000)


def peer_uid(transport: asyncio.BaseTransport) -> int | None:
    """The user at the other end of a unix socket (SO_PEERCRED); ``None`` if it has none."""
    peer: socket.socket | None = transport.get_extra_info("socket")
    if peer is None or peer.family != socket.AF_UNIX:
        return None
    data = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    return int(_PEERCRED.unpack(data)[1])


def say(text: str) -> None:
    """A line for the journal; none where its disk is full, or nobody reads: who tells of what has
    happened goes on with it."""
    JOURNAL.say(text)


def reason(error: Exception) -> tuple[str, str | None, int]:
    """Why a process ends: the message, a hint, and the exit code."""
    if isinstance(error, NbdmirrorError):
        return error.message, error.hint, error.exit_code
    if isinstance(error, OSError):
        return os_error_text(error), None, NbdmirrorError.exit_code
    told = "".join(traceback.format_exception(error)).rstrip()
    return f"a mistake of this program\n{told}", None, EXIT_MISTAKE


def say_why(error: Exception) -> int:
    """The same in the journal; returns the exit code."""
    message, hint, exit_code = reason(error)
    say(f"nbdmirror: {message}" + (f"\n  {hint}" if hint else ""))
    return exit_code
