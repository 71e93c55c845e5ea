"""Blocks that a tenant made to have the same checksum (4.1): no comparison takes one for the other.

XXH3, which guards records and frames against accidents, has collisions that anybody can make.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from xxhash import xxh3_64_intdigest

from nbdmirror.codec.hashing import digests
from tests.integration.cluster import Cluster
from tests.integration.test_replication import MakeCluster
from tests.integration.tools import connect

BLOCK = 4096
KEY = bytes(range(16))
AT = 640 * 1024
# The first two words of XXH3's default secret: the keys of the first lane in stripes 0 and 1.
SECRET = (0xBE4BA423396CFEB8, 0x1CAD21F72C81017C)
STRIPE = 64
LOW = 0xFFFFFFFF


def forged_pair() -> tuple[bytes, bytes]:
    """Two blocks with one XXH3-64.

    A lane adds the word itself to its neighbour, and the product of the halves of word ^ key to
    its own sum. With the lower half equal to the key's that product is 0 whatever the upper half
    is; so what is added to one stripe's upper half may be taken from the other's."""
    block = bytearray(random.Random(1).randbytes(BLOCK))
    blocks = []
    for moved in (0, 0x01234567):
        for stripe, change in ((0, moved), (1, -moved)):
            upper = (0x76543210 + change) & LOW
            word = upper << 32 | SECRET[stripe] & LOW
            block[stripe * STRIPE : stripe * STRIPE + 8] = word.to_bytes(8, "little")
        blocks.append(bytes(block))
    return blocks[0], blocks[1]


def test_the_pair_is_forged_and_told_apart() -> None:
    one, other = forged_pair()
    assert one != other
    for size in (BLOCK, 65536):  # as a record, as a block, as a region
        wide, wider = one.ljust(size, b"x"), other.ljust(size, b"x")
        assert xxh3_64_intdigest(wide) == xxh3_64_intdigest(wider), "the forgery does not work"
        assert digests(wide, size, KEY) != digests(wider, size, KEY)


@pytest.mark.parametrize("command", [("verify", "beta", "--repair"), ("resync", "beta", "--full")])
def test_a_forged_block_is_found_on_the_other_side(
    make_cluster: MakeCluster, command: tuple[str, ...]
) -> None:
    """X1, X6: the copy holds the other block of the pair; comparing sees it and sends it."""
    one, other = forged_pair()
    cluster = make_cluster().start()
    connect(cluster.primary.uri()).pwrite(one, AT)
    cluster.check_in_sync()
    _plant(cluster, other)
    cluster.primary.ok(*command, "--wait", "--timeout", "60")
    cluster.check_in_sync()
    facet = cluster.secondary.facets("data")[0]
    assert _block(facet) == one


def test_a_tenant_cannot_hide_a_write_from_a_resync(make_cluster: MakeCluster) -> None:
    """V6, X1: one block of the pair is there when the link is lost; the other is written, and the
    resync of what changed must not skip it."""
    one, other = forged_pair()
    cluster = make_cluster(log_size=1 << 20).start()
    handle = connect(cluster.primary.uri())
    handle.pwrite(one, AT)
    cluster.check_in_sync()
    cluster.proxy.refuse()
    cluster.primary.until("lost its link", lambda entry: entry["link"] != "connected")
    handle.pwrite(other, AT)
    for number in range(40):
        handle.pwrite(bytes(64 << 10), (16 << 20) + number * (64 << 10))
    cluster.primary.until("is in DCM logging", lambda entry: entry["state"] == "tracking")
    cluster.proxy.heal()
    cluster.check_in_sync()
    assert _block(cluster.secondary.facets("data")[0]) == other


def _plant(cluster: Cluster, block: bytes) -> None:
    cluster.secondary.stop()
    with cluster.secondary.facets("data")[0].open("r+b") as file:
        file.seek(AT)
        file.write(block)
    cluster.secondary.start()
    cluster.wait_in_sync()


def _block(facet: Path) -> bytes:
    with facet.open("rb") as file:
        file.seek(AT)
        return file.read(BLOCK)
