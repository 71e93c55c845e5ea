"""What is compared by hash, and what travels as zeros (X1)."""

from __future__ import annotations

import itertools
import random

import pytest

from nbdmirror.codec import repl
from nbdmirror.codec.hashing import BLOCK, HASH_SIZE, count, different, digests, zero_runs
from nbdmirror.codec.regions import Extent, pack_region, parse_hashes, parse_region
from nbdmirror.codec.repl import Frame, Type
from nbdmirror.errors import PeerError


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 7])
def test_one_hash_for_each_step(size: int) -> None:
    data = random.Random(size).randbytes(size)
    found = digests(data, BLOCK)
    assert len(found) == count(size, BLOCK) * HASH_SIZE
    for index in range(count(size, BLOCK)):
        piece = data[index * BLOCK :][:BLOCK]
        assert found[index * HASH_SIZE :][:HASH_SIZE] == digests(piece, BLOCK)


def test_different_names_the_blocks_that_changed() -> None:
    data = bytearray(random.Random(1).randbytes(8 * BLOCK))
    before = digests(data, BLOCK)
    for block in (0, 3, 7):
        data[block * BLOCK + 5] ^= 1
    assert different(digests(data, BLOCK), before) == bytes((1, 0, 0, 1, 0, 0, 0, 1))


def test_zero_runs_cover_everything_in_whole_blocks() -> None:
    rng = random.Random(2)
    for _ in range(200):
        blocks = [rng.choice([bytes(BLOCK), rng.randbytes(BLOCK)]) for _ in range(6)]
        data = b"".join(blocks) + bytes(rng.choice([0, 100]))
        at = 0
        kinds = []
        for offset, length, zeros in zero_runs(data):
            assert offset == at and length > 0
            assert zeros == (not any(data[offset : offset + length]))
            at += length
            kinds.append(zeros)
        assert at == len(data)
        assert all(one != other for one, other in itertools.pairwise(kinds))
    assert zero_runs(b"") == []


def frame(kind: Type, *parts: bytes) -> Frame:
    return Frame(kind, 1, memoryview(b"".join(parts)), False)


def test_a_region_is_read_as_it_was_made() -> None:
    extents: list[Extent] = [(0, 8192, None), (65536, 3, b"abc"), (1 << 40, 5, b"defgh")]
    parts = pack_region(9, 2, extents, more=True)
    region = parse_region(frame(Type.REGION, *map(bytes, parts)))
    assert (region.token, region.volume, region.more) == (9, 2, True)
    assert [(o, n, d if d is None else bytes(d)) for o, n, d in region.extents] == extents
    empty = parse_region(frame(Type.REGION, *map(bytes, pack_region(1, 0, [], more=False))))
    assert empty.extents == []


@pytest.mark.parametrize("cut", [1, 3, 40, 60])
def test_a_region_that_does_not_add_up_is_refused(cut: int) -> None:
    data = b"".join(map(bytes, pack_region(9, 2, [(0, 4096, b"x" * 4096)], more=False)))
    with pytest.raises(PeerError):
        parse_region(frame(Type.REGION, data[:-cut]))
    with pytest.raises(PeerError):
        parse_region(frame(Type.REGION, data, b"more"))
    lies = repl.REGION.pack(1, 0, 0, 1 << 31, 0)
    with pytest.raises(PeerError, match="extents"):
        parse_region(frame(Type.REGION, lies))


def test_hashes_must_fit_their_range() -> None:
    head = repl.HASHES.pack(1, 0, 65536, 0, 100_000)
    assert parse_hashes(frame(Type.HASHES, head, bytes(32))).count == 2
    assert parse_hashes(frame(Type.HASHES, head)).hashes.nbytes == 0
    for wrong in (bytes(16), bytes(33), bytes(48)):
        with pytest.raises(PeerError):
            parse_hashes(frame(Type.HASHES, head, wrong))
    verify = repl.VERIFY.pack(1, 0, 65536, 0, 100_000, 7)
    assert parse_hashes(frame(Type.VERIFY, verify, bytes(32))).seq == 7
    with pytest.raises(PeerError):
        parse_hashes(frame(Type.VERIFY, verify))
    with pytest.raises(PeerError):
        parse_hashes(frame(Type.HASHES, repl.HASHES.pack(1, 0, 0, 0, 1)))
