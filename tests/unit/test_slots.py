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


OLD, NEW = slots.encode(6, {"n": "old"}), slots.encode(7, {"n": "new"})


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
    ids=["second", "first", "one", "other", "torn text", "torn counter", "cut"],
)
def test_choose(images: list[bytes], index: int, name: str) -> None:
    found, counter, state = slots.choose(images)
    assert (found, state) == (index, {"n": name})
    assert counter == (7 if name == "new" else 6)


def test_no_valid_slot_is_an_error_that_names_both_reasons() -> None:
    with pytest.raises(FormatError, match=r"never written.*checksum"):
        slots.choose([NEVER, damaged(NEW, 33)])


def test_every_byte_is_guarded() -> None:
    used = 32 + len('{"n":"new"}')
    for at in range(used):
        with pytest.raises(FormatError):
            slots.decode(damaged(NEW, at))
    for length in range(used):
        with pytest.raises(FormatError):
            slots.decode(NEW[:length])


def test_a_state_that_outgrew_its_slot_is_refused() -> None:
    with pytest.raises(FormatError, match="larger than its slot"):
        slots.encode(1, {"n": "x" * slots.SLOT_SIZE})
