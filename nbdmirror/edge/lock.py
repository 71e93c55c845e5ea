"""One process per state directory: the lock that the running node holds.

A lock on the directory itself (flock), so there is no file to forget, and the kernel gives it
back however the process ends. Called by the daemon before it opens any state.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from nbdmirror.errors import StateError

WAIT_SECONDS = 10.0
"""A process that is being killed needs a moment until its descriptors are closed."""
_POLL_SECONDS = 0.02


@contextmanager
def exclusive(directory: str) -> Iterator[None]:
    """Holds the state directory; StateError if another process keeps it for ``WAIT_SECONDS``.

    A directory that is not there has nothing to protect: opening the state says what is wrong."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        yield
        return
    try:
        _lock(fd, directory)
        yield
    finally:
        os.close(fd)


def _lock(fd: int, directory: str) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise StateError(
                    f"another process runs the node of {directory}",
                    hint="stop it first; a state directory belongs to one daemon",
                ) from None
            time.sleep(_POLL_SECONDS)
        else:
            return
