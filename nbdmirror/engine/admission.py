"""Who may come in: counts connections, and lets the oldest stranger go when there are too many.

A stranger is a connection whose handshake has not ended. Strangers never keep others out: one too
many, in total or from one address, ends the oldest, so a client that means it gets through while
a thousand stall (reliability.md 4.1, fault 36). Who has proved itself is not sent away for one
that has not. Owns counts only; each listener's protocol asks it. Part of ``Room`` is shared by all
gates of a node: the descriptors of the process.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable
from typing import Any

from nbdmirror.config import Limits

_V6_PREFIX = 64


def address_of(transport: asyncio.BaseTransport) -> str:
    """Who connects, as far as counting goes: the IPv4 address, the IPv6 network of 64 bits that
    one host can draw from, or nothing for a unix socket."""
    peer = transport.get_extra_info("peername")
    if not isinstance(peer, tuple) or not peer:
        return ""
    return counted_as(str(peer[0]))


def counted_as(host: str) -> str:
    """The part of an IP address that strangers are counted by."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 4:
        return str(address)
    mapped = address.ipv4_mapped
    if mapped is not None:
        return str(mapped)
    return str(ipaddress.ip_network((address, _V6_PREFIX), strict=False))


CONNECTIONS_MIN = 4
"""With descriptors for fewer connections a node is of no use."""


class Room:
    """How many connections the process has descriptors for; all gates of a node share one.

    Files that are opened later take theirs from the same: it is counted again and again."""

    def __init__(self) -> None:
        self.total: int | None = None
        """None: not known yet, or without a bound."""
        self.taken = 0
        self.elsewhere: Callable[[], int] = lambda: 0
        """How many more there are, that come in by no gate (nbdkit's)."""
        self.count: Callable[[bool], int | None] = lambda at_once: None
        """How many descriptors are free that are not reserved; None: as before, as far as is known,
        for it was counted a moment ago (not if it must be ``at_once``)."""

    def take(self) -> None:
        """A connection has come in."""
        self.taken += 1

    def give(self) -> None:
        """A connection has gone."""
        self.taken -= 1

    @property
    def left(self) -> int | None:
        """For how many more there are descriptors that are not reserved; below 0: too many are in.
        None: without a bound."""
        self._recount(at_once=False)
        return None if self.total is None else self.total - self.taken - self.elsewhere()

    def recount(self) -> None:
        """Looks at what there is now."""
        self._recount(at_once=True)

    def _recount(self, *, at_once: bool) -> None:
        counted = self.count(at_once)
        if counted is not None:
            self.total = counted + self.taken + self.elsewhere()

    def shortage(self, files: int) -> str | None:
        """Why so many files cannot be opened for good: they would take descriptors that are
        reserved, or those without which the next start refuses. None if they can."""
        self.recount()
        left = self.left
        if left is None or self.total is None:
            return None
        if files <= left and files + CONNECTIONS_MIN <= self.total:
            return None
        return f"{files} files would take descriptors that are reserved: {max(left, 0)} others left"

    @property
    def full(self) -> bool:
        """Whether one more would take a descriptor that is reserved."""
        left = self.left
        return left is not None and left <= 0


class Reserve(Room):
    """A part that is kept for one gate; its connections beyond that share the common room."""

    def __init__(self, common: Room) -> None:
        super().__init__()
        self._common = common
        self.part: int | None = None
        """Of so many; None: not known yet, or without a bound."""

    def take(self) -> None:
        """As ``Room``."""
        if self.part is not None and self.taken >= self.part:
            self._common.take()
        super().take()

    def give(self) -> None:
        """As ``Room``."""
        super().give()
        if self.part is not None and self.taken >= self.part:
            self._common.give()

    @property
    def used(self) -> int:
        """So much of the part is in use."""
        return min(self.taken, self.part or 0)

    @property
    def full(self) -> bool:
        """As ``Room``."""
        return self.part is not None and self.taken >= self.part and self._common.full


class Guest:
    """One connection that was let in."""

    __slots__ = ("_gate", "address", "end", "inside")

    def __init__(self, gate: Gate, address: str, end: Callable[[], object]) -> None:
        self._gate = gate
        self.address = address
        self.end = end
        self.inside = True

    def known(self) -> None:
        """The handshake has ended well: no stranger any more."""
        self._gate.strangers.pop(self, None)

    def leave(self) -> None:
        """The connection is over; idempotent."""
        if self.inside:
            self.inside = False
            self._gate.left(self)


class Gate:
    """The connections of one kind: at most ``guests_max``, ``strangers_max`` of them strangers,
    ``per_address_max`` of these from one address (unix sockets have none, and are not counted so).
    """

    def __init__(
        self, room: Room, guests_max: int, strangers_max: int, per_address_max: int
    ) -> None:
        self._room = room
        self._guests_max = guests_max
        self._strangers_max = strangers_max
        self._per_address_max = per_address_max
        self.guests = 0
        self.strangers: dict[Guest, None] = {}
        self.evicted = 0
        self.refused = 0

    @classmethod
    def of(cls, room: Room, guests_max: int, limits: Limits) -> Gate:
        """One with the limits of the configuration for strangers."""
        return cls(room, guests_max, limits.strangers_max, limits.strangers_per_address_max)

    def enter(self, address: str, end: Callable[[], object]) -> Guest | None:
        """Lets a connection in, as a stranger; None if there is no room for it.

        ``end`` closes it at once, should its place be needed."""
        same = [guest for guest in self.strangers if guest.address == address] if address else []
        if len(same) >= self._per_address_max:
            self._evict(same[0])
        elif len(self.strangers) >= self._strangers_max or self._full():
            self._evict(next(iter(self.strangers), None))
        if self._full():
            self.refused += 1
            return None
        guest = Guest(self, address, end)
        self.strangers[guest] = None
        self.guests += 1
        self._room.take()
        return guest

    def _full(self) -> bool:
        return self.guests >= self._guests_max or self._room.full

    def _evict(self, guest: Guest | None) -> None:
        if guest is not None:
            self.evicted += 1
            guest.leave()
            guest.end()

    def left(self, guest: Guest) -> None:
        """A guest has gone (its ``leave`` says so)."""
        self.strangers.pop(guest, None)
        self.guests -= 1
        self._room.give()

    def status(self) -> dict[str, Any]:
        """What the status tells of it."""
        return {
            "open": self.guests,
            "strangers": len(self.strangers),
            "evicted": self.evicted,
            "refused": self.refused,
        }
