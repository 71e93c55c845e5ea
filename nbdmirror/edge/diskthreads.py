"""The threads that wait for disks: some for each device, so that one that hangs stops no other.

A disk that stops answering keeps every thread that reads from it. Were they taken from one pool,
reads of all other volumes that are not cached would wait for that disk (M8, I8).
"""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor

THREADS_MAX = 32
"""For reads and large writes, of each device; they start one by one, when they are needed. The unit
in deploy/ allows for a hundred devices."""
SYNC_THREADS_MAX = 8
"""A file has one sync at a time."""


class DeviceThreads:
    """Those of one device: for reads and large writes, and separately for syncs, so that a file
    whose reads hang does not keep another one there from being synced; and one for what only the
    page cache gains by."""

    def __init__(self, threads_max: int) -> None:
        self.io = ThreadPoolExecutor(threads_max, thread_name_prefix="disk-io")
        syncs = min(threads_max, SYNC_THREADS_MAX)
        self.sync = ThreadPoolExecutor(syncs, thread_name_prefix="disk-sync")
        self.cache = ThreadPoolExecutor(1, thread_name_prefix="disk-cache")

    def close(self) -> None:
        """Lets the threads end; waits for none of them."""
        for pool in (self.io, self.sync, self.cache):
            pool.shutdown(wait=False)


class DiskThreads:
    """Those of all devices; at most ``threads_max`` of a kind for one."""

    def __init__(self, threads_max: int = THREADS_MAX) -> None:
        self._threads_max = threads_max
        self._devices: dict[int, DeviceThreads] = {}
        self.names = DeviceThreads(threads_max)
        """For directories and names in them; asking where these lie might stall already."""

    def of(self, opened: os.stat_result) -> DeviceThreads:
        """Those for an open file, or block device."""
        device = opened.st_rdev if stat.S_ISBLK(opened.st_mode) else opened.st_dev
        if device not in self._devices:
            self._devices[device] = DeviceThreads(self._threads_max)
        return self._devices[device]

    def close(self) -> None:
        """Lets the threads end; waits for none of them."""
        self.names.close()
        for threads in self._devices.values():
            threads.close()
