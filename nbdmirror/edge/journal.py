"""Lines for the journal (stderr), written by a thread of their own: a pipe that is open and that
nobody reads takes no more once it is full, and who writes to it waits. The event loop never does
(I8). What cannot be written yet is kept, within a bound (I6); what is beyond that is dropped, and
counted in a line of its own once there is room again.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import select
import threading
from collections import deque

STDERR = 2
KEPT_BYTES_MAX = 1 << 20
END_SECONDS = 2.0
"""At its end a process waits so long for what it has said last to be written."""


class Journal:
    """What is written to one file descriptor; its thread begins with the first line."""

    def __init__(self, fd: int = STDERR) -> None:
        self._fd = fd
        self.forked()

    def forked(self) -> None:
        """In the child of a fork, which has neither the thread nor what was left to it."""
        self._changed = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._bytes = 0  # kept, what is being written included
        self._dropped = 0
        self._thread: threading.Thread | None = None

    def say(self, text: str) -> None:
        """Takes a line; never waits for whoever reads them."""
        line = text.encode(errors="backslashreplace") + b"\n"
        with self._changed:
            if self._bytes + len(line) > KEPT_BYTES_MAX:
                self._dropped += 1
                return
            self._tell_dropped()
            self._keep(line)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
                self._thread.start()

    def flush(self, seconds: float = END_SECONDS) -> bool:
        """Whether all lines are written; waits so long for it."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._bytes, seconds)

    def _keep(self, line: bytes) -> None:
        self._lines.append(line)
        self._bytes += len(line)
        self._changed.notify_all()

    def _tell_dropped(self) -> None:
        """In their place: behind what was kept, before what is said from now on."""
        if self._dropped:
            self._keep(b"journal-full %d lines were dropped: nobody read\n" % self._dropped)
            self._dropped = 0

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._lines))
                line = self._lines.popleft()
            self._write(line)
            with self._changed:
                self._bytes -= len(line)
                if not self._lines:
                    self._tell_dropped()
                self._changed.notify_all()

    def _write(self, line: bytes) -> None:
        """Where the disk is full, or nobody has the pipe open, there is no line. A pipe that is
        full is waited for, also one that whoever shares it with us has made not to wait."""
        rest = memoryview(line)
        with contextlib.suppress(OSError):
            while rest:
                try:
                    rest = rest[os.write(self._fd, rest) :]
                except BlockingIOError:
                    room = select.poll()
                    room.register(self._fd, select.POLLOUT)
                    room.poll()


class LogHandler(logging.Handler):
    """What the event loop and its libraries log, in the same lines."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(logging.WARNING)
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        """A record, with the traceback that belongs to it."""
        self._journal.say(self.format(record))


JOURNAL = Journal()
os.register_at_fork(after_in_child=JOURNAL.forked)
atexit.register(JOURNAL.flush)
