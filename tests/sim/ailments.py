"""How an operation fails in a sweep: the kinds of faults, and the injector that lights one."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, replace

from tests.sim.faults import LOOKS, READS, Fault, Kind
from tests.sim.host import Host


@dataclass(frozen=True, slots=True)
class Ailment:
    """A kind of fault: what it does to an operation, and for how long it stays."""

    fault: Fault | None = None
    where: str = "once"
    """``once``: that operation; ``file``: and all later ones on that file; ``disk``: on any."""
    strike: str = ""
    """``lost``, ``torn`` or ``kill``: the node ends instead, or in the middle of the write that has
    the fault; ``twice``: and again, recovering."""
    draw: int = 0

    def suits(self, operation: str) -> bool:
        """Whether that operation can have it."""
        if self.fault is None:
            return operation not in (*READS, *LOOKS)
        if self.fault.number == errno.ENOSPC and operation in (*READS, *LOOKS, "unlink"):
            return False
        if self.fault.number == errno.EROFS and operation in (*READS, *LOOKS):
            return False
        return self.fault.suits(operation)


AILMENTS: dict[str, Ailment] = {
    "EIO once": Ailment(Fault(Kind.ERROR)),
    "EIO file": Ailment(Fault(Kind.ERROR), "file"),
    "EIO disk": Ailment(Fault(Kind.ERROR), "disk"),
    "ENOSPC once": Ailment(Fault(Kind.ERROR, errno.ENOSPC)),
    "ENOSPC disk": Ailment(Fault(Kind.ERROR, errno.ENOSPC), "disk"),
    "EROFS disk": Ailment(Fault(Kind.ERROR, errno.EROFS), "disk"),
    "short once": Ailment(Fault(Kind.SHORT)),
    "short file": Ailment(Fault(Kind.SHORT), "file"),
    "sync lost once": Ailment(Fault(Kind.LOSE)),
    "sync lost file": Ailment(Fault(Kind.LOSE), "file"),
    "power, all lost": Ailment(strike="lost"),
    "power, torn 1": Ailment(strike="torn", draw=1),
    "power, torn 2": Ailment(strike="torn", draw=2),
    "power twice": Ailment(strike="twice"),
    "kill": Ailment(strike="kill"),
    "kill, half": Ailment(Fault(Kind.SHORT), strike="kill"),
}


class Fuse:
    """The injector of the node under test."""

    def __init__(self, host: Host, ailment: Ailment, nth: int, strike: Callable[[], None]) -> None:
        self.host = host
        self.armed = False
        self.operations: list[tuple[str, str]] = []
        self.lost_log = False
        """A sync of the log failed, and what was not durable may be gone."""
        self._ailment = ailment
        self.nth = nth
        self._strike = strike
        self._failed: tuple[str, str] | None = None

    def arm(self) -> None:
        """From here on operations count."""
        self.armed = True

    def mend(self) -> None:
        """The disk is healthy."""
        self.armed = False
        self.host.disk.broken.clear()
        self.host.disk.faults = None

    @property
    def burnt(self) -> str:
        """The operation that failed."""
        return "none" if self._failed is None else " ".join(self._failed)

    def __call__(self, operation: str, path: str, nth: int) -> Fault | None:
        if not self.armed:
            return None
        self.operations.append((operation, path))
        count = len(self.operations)
        if count == self.nth and self._ailment.suits(operation):
            self._failed = self._failed or (operation, path)
            if self._ailment.fault is None:
                self._strike()
                return None
            if self._ailment.strike:
                return replace(self._ailment.fault, then=self._strike)
        elif self._failed is None or not self._again(operation, path):
            return None
        fault = self._ailment.fault
        if fault is not None and fault.kind is Kind.LOSE and path.endswith("/log"):
            self.lost_log = True
        return fault

    def _again(self, operation: str, path: str) -> bool:
        where = self._ailment.where
        if where == "once" or not self._ailment.suits(operation):
            return False
        return where == "disk" or (self._failed is not None and path == self._failed[1])
