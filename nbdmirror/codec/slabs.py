"""Buffers for receiving that are used again once nothing points into them any more.

A payload is never copied between the socket and the disks: log, facets and senders hold views
into the buffer that it was received in. A fresh buffer for each would cost more than receiving
into it does (zeroing, page faults); so buffers come from a pool, which asks each whether a view
of it is still alive.
"""

from __future__ import annotations

from collections import deque

POOLED_BYTES = 64 << 20
"""What a pool remembers; buffers beyond that are left to the allocator."""
_LOOKS = 4
"""Buffers that are asked before a fresh one is made: a few may be pinned by a slow reader."""


class SlabPool:
    """Buffers of ``size`` bytes; what lies in one that is handed out again is old content."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._buffers: deque[bytearray] = deque(maxlen=max(1, POOLED_BYTES // size))

    def take(self) -> memoryview:
        """A buffer that nobody else has a view of; it is back when every view of it is gone."""
        buffers = self._buffers
        for _ in range(min(_LOOKS, len(buffers))):
            # Oldest first: the log lets go of its records in the order in which they came.
            buffer = buffers[0]
            buffers.rotate(-1)
            if _unused(buffer):
                return memoryview(buffer)
        buffer = bytearray(self.size)
        buffers.append(buffer)
        return memoryview(buffer)


def _unused(buffer: bytearray) -> bool:
    """Whether no view of it is alive: only then does Python let its length change."""
    try:
        last = buffer.pop()
    except BufferError:
        return False
    buffer.append(last)
    return True
