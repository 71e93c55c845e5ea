"""Strangers make room for strangers, never for good; what is reserved stays free (faults 35, 36).

One clock of the test moves nothing here: a gate only counts.
"""

from __future__ import annotations

import pytest

from nbdmirror.config import AccessConfig
from nbdmirror.engine.access import Client, Rules
from nbdmirror.engine.admission import Gate, Guest, Reserve, Room, counted_as


class Door:
    """A gate, and who was sent away by it."""

    def __init__(self, guests: int = 4, strangers: int = 3, address: int = 2) -> None:
        self.room = Room()
        self.gate = Gate(self.room, guests, strangers, address)
        self.ended: list[str] = []

    def enter(self, name: str, address: str = "") -> Guest | None:
        return self.gate.enter(address, lambda: self.ended.append(name))


def test_the_oldest_stranger_goes() -> None:
    door = Door()
    for name in "abcd":
        assert door.enter(name) is not None
    assert door.ended == ["a"]
    assert door.gate.status() == {"open": 3, "strangers": 3, "evicted": 1, "refused": 0}


def test_one_address_evicts_its_own() -> None:
    door = Door()
    door.enter("first", "10.0.0.1")
    for name in "abc":
        door.enter(name, "10.0.0.2")
    assert door.ended == ["a"]


def test_who_is_known_is_never_sent_away() -> None:
    door = Door(guests=2)
    guests = [guest for name in "ab" if (guest := door.enter(name))]
    for guest in guests:
        guest.known()
    assert door.enter("c") is None
    assert door.ended == []
    assert door.gate.refused == 1
    guests[0].leave()
    assert door.enter("d") is not None


def test_full_of_strangers_lets_one_more_in() -> None:
    door = Door(guests=2, strangers=9)
    for name in "abc":
        assert door.enter(name) is not None
    assert door.ended == ["a"]


def test_leaving_twice_counts_once() -> None:
    door = Door()
    guest = door.enter("a")
    assert guest is not None
    guest.leave()
    guest.leave()
    assert (door.gate.guests, door.room.taken) == (0, 0)


def test_descriptors_are_shared_and_reserved() -> None:
    door = Door(guests=9, strangers=9)
    other = Gate(door.room, 9, 9, 9)
    door.room.total = 2
    known = other.enter("", lambda: None)
    assert known is not None
    known.known()
    door.enter("a")
    door.enter("b")
    assert door.ended == ["a"], "a stranger makes room, not who is known at the other gate"
    assert other.enter("", lambda: None) is None
    assert door.room.taken == 2


def test_files_that_are_opened_later_take_their_descriptors() -> None:
    """Fault 35: what is left is counted anew, and files get none of those that are reserved."""
    door = Door(guests=9, strangers=9)
    free: list[int | None] = [6]
    door.room.count = lambda at_once: free[-1]
    door.enter("a")
    free.append(None)  # counted a moment ago: that one is known
    assert door.room.left == 5 and not door.room.full
    free.append(3)
    assert door.room.left == 3
    free.append(0)
    assert door.room.full
    free.append(5)
    assert door.room.shortage(2) is None
    assert "5 others left" in str(door.room.shortage(6))
    assert door.room.shortage(3) is not None, "the next start could serve nobody"
    assert Room().shortage(1000) is None


def test_a_reserve_is_for_one_gate_which_shares_the_rest() -> None:
    """The places of the admin socket: some are kept, for more it takes from all."""
    common = Room()
    common.total = 2
    reserve = Reserve(common)
    reserve.part = 2
    gate, crowd = Gate(reserve, 9, 9, 9), Gate(common, 9, 9, 9)
    inside = [gate.enter("", lambda: None) for _ in range(3)]
    assert all(inside) and (reserve.taken, reserve.used, common.left) == (3, 2, 1)
    one = crowd.enter("", lambda: None)
    assert one is not None and common.full
    one.known()
    for guest in inside:
        assert guest is not None
        guest.known()
    assert gate.enter("", lambda: None) is None, "beyond its part it has what is left for all"
    for guest in inside[:2]:
        assert guest is not None
        guest.leave()
    assert (reserve.taken, common.left) == (1, 1)
    assert crowd.enter("", lambda: None) is not None and common.full
    assert gate.enter("", lambda: None) is not None, "its part is its own"


@pytest.mark.parametrize(
    ("host", "counted"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:0:1:aaaa::1", "2001:db8:0:1::/64"),
        ("2001:db8:0:1:bbbb::2", "2001:db8:0:1::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_addresses_count_as_what_one_host_has(host: str, counted: str) -> None:
    assert counted_as(host) == counted


RULES = Rules(AccessConfig(False, ("laptop", "backup"), ("192.0.2.0/28", "2001:db8::/32"), 2))


@pytest.mark.parametrize(
    ("client", "clients", "word"),
    [
        (Client("192.0.2.1", ("laptop",)), 1, None),
        (Client("::ffff:192.0.2.1", ("x", "backup")), 0, None),
        (Client("2001:db8::9", ("backup",)), 0, None),
        (Client(), 0, None),
        (Client("192.0.2.1", ("laptop",)), 2, "2 clients"),
        (Client(None), 2, "2 clients"),
        (Client("192.0.2.1"), 0, "one of the clients"),
        (Client("192.0.2.1", ("laptop.example",)), 0, "one of the clients"),
        (Client("192.0.2.16", ("laptop",)), 0, "address"),
        (Client("192.0.2.100", ("laptop",)), 0, "address"),  # CVE-2013-6410: no prefix of text
    ],
)
def test_rules(client: Client, clients: int, word: str | None) -> None:
    refusal = RULES.refusal(client, clients)
    assert refusal is None if word is None else word in (refusal or "")


def test_a_rule_that_names_nobody_lets_nobody_in() -> None:
    assert Rules(AccessConfig(names=())).refusal(Client("::1", ("laptop",)), 0)
    assert Rules(AccessConfig(addresses=())).refusal(Client("::1"), 0)
