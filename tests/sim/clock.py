"""The wall clock of a simulated host: virtual time plus an offset that tests may move."""

from __future__ import annotations

import functools
import uuid

from tests.sim.disk import SimDisk
from tests.sim.loop import SECOND_NS, SimLoop

EPOCH_NS = 1_700_000_000 * SECOND_NS


class SimClock:
    """``ports.Clock`` of one host; its boot id changes with each power cut of the host's disk."""

    def __init__(self, loop: SimLoop, disk: SimDisk) -> None:
        self.offset_ns = 0
        self._loop = loop
        self._disk = disk

    def time_ns(self) -> int:
        return EPOCH_NS + self._loop.now_ns + self.offset_ns

    def monotonic_ns(self) -> int:
        return self._loop.now_ns

    def boot_id(self) -> str:
        return _boot_id(self._disk.node, self._disk.boots)


@functools.cache
def _boot_id(node: str, boots: int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{node}:{boots}"))
