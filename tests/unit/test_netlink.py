"""``codec.netlink``: bytes as the kernel's headers have them, and damage that is noticed.

The golden bytes are written by hand after linux/netlink.h, genetlink.h and nbd-netlink.h.
"""

from __future__ import annotations

import struct
import sys

import pytest

from nbdmirror.codec import netlink
from nbdmirror.codec.netlink import Attribute, Command
from nbdmirror.errors import FormatError

pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="the bytes are little-endian")

GET_FAMILY = "1c000000 1000 0500 01000000 00000000 03010000 0800 0200 6e626400"
DISCONNECT = "1c000000 1d00 0500 02000000 00000000 02010000 0800 0100 07000000"
SOCKETS = "1c00 0780 0c00 0180 0800 0100 05000000 0c00 0180 0800 0100 06000000"
ACKNOWLEDGED = "24000000 0200 0001 02000000 00000000 00000000 1c000000 1d00 0500 02000000 00000000"
BUSY = "24000000 0200 0000 03000000 00000000 f0ffffff 1c000000 1d00 0500 02000000 00000000"
LINK_DEAD = "1c000000 1d00 0000 00000000 00000000 04010000 0800 0100 07000000"


def golden(text: str) -> bytes:
    """The bytes of a hexadecimal text."""
    return bytes.fromhex(text)


def test_request_bytes() -> None:
    """Length, type, flags (request, acknowledge), sequence, port; command, version; attributes."""
    payload = netlink.family_request()
    assert netlink.request(netlink.CONTROLLER, 3, 1, payload) == golden(GET_FAMILY)
    payload = netlink.u32(Attribute.INDEX, 7)
    assert netlink.request(29, Command.DISCONNECT, 2, payload) == golden(DISCONNECT)


def test_socket_bytes() -> None:
    """Sockets are items in a nest, each a nest of its own."""
    assert netlink.sockets([5, 6]) == golden(SOCKETS)


def test_attribute_padding() -> None:
    """The length of an attribute is without its padding; the next one begins behind it."""
    data = netlink.text(Attribute.BACKEND_IDENTIFIER, "abcd") + netlink.u64(Attribute.TIMEOUT, 9)
    assert data[:2] == b"\x09\x00"
    assert len(data) == 12 + 12
    assert netlink.attributes(data) == (
        (Attribute.BACKEND_IDENTIFIER, b"abcd\0"),
        (Attribute.TIMEOUT, struct.pack("=Q", 9)),
    )


def test_messages() -> None:
    """An acknowledgement, an error with its errno, an event: in one receive."""
    data = golden(ACKNOWLEDGED) + golden(BUSY) + golden(LINK_DEAD)
    acknowledged, busy, event = netlink.messages(data)
    assert (acknowledged.sequence, acknowledged.errno) == (2, 0)
    assert (busy.sequence, busy.errno) == (3, 16)
    assert (event.errno, event.command) == (None, Command.LINK_DEAD)
    assert netlink.number(event.get(Attribute.INDEX)) == 7


def family_reply(group: str) -> netlink.Message:
    """The controller's answer, with one multicast group of that name."""
    entry = netlink.text(netlink.Group.NAME, group) + netlink.u32(netlink.Group.ID, 4)
    content = netlink.attribute(netlink.Control.FAMILY_ID, b"\x1d\0") + netlink.nested(
        netlink.Control.MULTICAST_GROUPS, [netlink.nested(1, [entry])]
    )
    (message,) = netlink.messages(netlink.request(netlink.CONTROLLER, 1, 1, content))
    return message


def test_family() -> None:
    """The family's id and the group that its events come through."""
    assert netlink.family(family_reply("nbd_mc_group")) == netlink.Family(29, 4)
    with pytest.raises(FormatError, match="no multicast group"):
        netlink.family(family_reply("other"))


@pytest.mark.parametrize(("flag", "expected"), [(0, False), (1, True)])
def test_status(flag: int, expected: bool) -> None:
    """STATUS lists devices; one that is not listed is not connected."""
    device = [
        netlink.u32(netlink.DEVICE_INDEX, 7),
        netlink.attribute(netlink.DEVICE_CONNECTED, bytes([flag])),
    ]
    payload = netlink.nested(Attribute.DEVICE_LIST, [netlink.nested(netlink.ITEM, device)])
    (message,) = netlink.messages(netlink.request(29, Command.STATUS, 1, payload))
    assert netlink.connected(message, 7) is expected
    assert netlink.connected(message, 8) is False


@pytest.mark.parametrize(
    "data",
    [
        golden(LINK_DEAD)[:-1],
        golden(LINK_DEAD)[:10],
        golden(LINK_DEAD).replace(b"\x1c", b"\x0f", 1),
        golden(LINK_DEAD).replace(b"\x1c", b"\xff", 1),
        golden(LINK_DEAD).replace(b"\x08\x00", b"\x03\x00", 1),
        golden(LINK_DEAD).replace(b"\x08\x00", b"\x09\x00", 1),
    ],
)
def test_damage(data: bytes) -> None:
    """Lengths that do not fit are refused, and never loop for ever (I9)."""
    with pytest.raises(FormatError):
        netlink.messages(data)


def test_number_without_value() -> None:
    """A number that is missing or too long is an error, not a zero."""
    for value in (None, b"", bytes(9)):
        with pytest.raises(FormatError):
            netlink.number(value)
