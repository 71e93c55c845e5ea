"""A simulated host for tests of one engine module: virtual time, a disk that can fail."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TypeVar

from tests.sim.disk import SimDisk
from tests.sim.faults import Fault, Kind
from tests.sim.loop import SimLoop

T = TypeVar("T")
STATE = "/state"


def make_disk(seed: object = 0, *, capacity: int | None = None) -> SimDisk:
    disk = SimDisk("alpha", seed, capacity=capacity)
    disk.make_directory(STATE)
    return disk


def run(main: Coroutine[object, object, T]) -> T:
    """Runs to the end in virtual time; whatever the loop would only have logged fails the test."""
    loop = SimLoop()
    try:
        result: T = loop.run_until_complete(main)
        assert loop.errors == []
        return result
    finally:
        loop.close()


def fail(
    operation: str, times: int = 1, *, path: str = "", number: int = 5
) -> Callable[..., Fault | None]:
    """An injector: the next ``times`` operations of that name fail, on paths ending in ``path``."""
    left = [times]

    def inject(found: str, where: str, _nth: int) -> Fault | None:
        if found != operation or not where.endswith(path) or not left[0]:
            return None
        left[0] -= 1
        return Fault(Kind.ERROR, number)

    return inject
