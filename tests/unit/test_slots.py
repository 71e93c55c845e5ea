"""The superblock's slots (O11, O17): the newer valid one counts, a damaged one never does."""

from __future__ import annotations

import pytest

from nbdmirror.codec import slots
from nbdmirror.errors import FormatError

NEVER = bytes(512)


def damaged(slot: bytes, at: int) -> bytes:
    return slot[:at] + bytes([slot[at] ^ 0x10]) + slot[at + 1 :]


def test_round_trip_in_whole_sectors() -> None:
    slot = slots.encode(2**63, {"b": [1, None], "a": "ä"})
    assert len(slot) % 512 == 0
    assert slots.decode(slot) == (2**63, {"a": "ä", "b": [1, None]})
    assert slots.decode(slot.ljust(slots.SLOT_SIZE, b"x")) == slots.decode(slot)


def test_a_slot_is_trimmed_to_what_was_written() -> None:
    for name in ("n", "x" * 470, "x" * 2000):
        slot = slots.encode(7, {"n": name})
        assert slots.trimmed(slot.ljust(slots.SLOT_SIZE, b"x")) == slot


OLD, NEW = slots.encode(7, {"n": "old"}), slots.encode(8, {"n": "new"})


@pytest.mark.parametrize(
    ("images", "index", "name"),
    [
        ([OLD, NEW], 1, "new"),
        ([NEW, OLD], 0, "new"),
        ([OLD, NEVER], 0, "old"),
        ([NEVER, OLD], 1, "old"),
        ([OLD, damaged(NEW, 40)], 0, "old"),
        ([damaged(NEW, 9), OLD], 1, "old"),
        ([OLD, NEW[:20]], 0, "old"),
    ],
    ids=["second", "first", "one", "other", "text", "counter", "cut"],
)
def test_choose(images: list[bytes], index: int, name: str) -> None:
    found, counter, state = slots.choose(images)
    assert (found, state) == (index, {"n": name})
    assert counter == (8 if name == "new" else 7)


def test_no_valid_slot_is_an_error_that_names_both_reasons() -> None:
    with pytest.raises(FormatError, match=r"never written.*checksum"):
        slots.choose([NEVER, damaged(NEW, 33)])


def test_every_byte_is_guarded() -> None:
    slot = slots.encode(7, {"n": "x" * 600})
    assert len(slot) == 1024
    for at in range(len(slot)):
        with pytest.raises(FormatError):
            slots.decode(damaged(slot, at))
        assert slots.damage([slot, damaged(slot, at)]) is not None
    for length in range(0, len(slot), 7):
        with pytest.raises(FormatError):
            slots.decode(slot[:length])


LONG = [slots.encode(counter, {"n": f"{counter}" * 700}) for counter in (6, 7, 8)]


@pytest.mark.parametrize("landed", [0b01, 0b10])
@pytest.mark.parametrize("before", [LONG[0], slots.encode(6, {"n": "short"}), b""])
def test_a_torn_save_is_not_damage(before: bytes, landed: int) -> None:
    """Fault 3: whichever sectors of a save land, the other slot counts and is not doubted; a slot
    that was damaged after its save is another matter (fault 15)."""
    sectors = []
    for number in range(len(LONG[2]) // 512):
        source = LONG[2] if landed >> number & 1 else before
        sectors.append(source[number * 512 : (number + 1) * 512].ljust(512, b"\0"))
    torn = b"".join(sectors).ljust(slots.SLOT_SIZE, b"\0")
    assert slots.damage([LONG[1], torn]) is None
    assert slots.choose([LONG[1], torn])[:2] == (0, 7)


def test_damage_names_the_slot_and_what_is_wrong_with_it() -> None:
    assert slots.damage([OLD, NEW]) is None and slots.damage([NEVER, NEW]) is None
    assert (
        slots.damage([OLD, damaged(NEW, 30)]) == "slot 1: superblock slot checksum does not match"
    )
    other = slots.damage([b"NMSUPER1".ljust(512, b"\1"), NEW])
    assert other is not None and other.startswith("slot 0: superblock slot of another format")
    moved = LONG[2][512:].ljust(slots.SLOT_SIZE, b"\0")  # fault 16: written to the wrong place
    assert slots.damage([OLD, moved]) == "slot 1: superblock sector 1 where 0 should be"


def test_a_save_in_the_other_slot_is_damage_and_counts() -> None:
    """Fault 16: it is the newest there is, and a save is missing where it should have gone."""
    images = [slots.encode(counter, {"n": counter}) for counter in (7, 9)]
    assert slots.damage(images) == "slot 1: holds save 9 of the other slot: a write went astray"
    assert slots.choose(images)[:2] == (1, 9)


def test_a_state_that_outgrew_its_slot_is_refused() -> None:
    with pytest.raises(FormatError, match="larger than its slot"):
        slots.encode(1, {"n": "x" * slots.SLOT_SIZE})
