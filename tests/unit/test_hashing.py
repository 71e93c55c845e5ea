"""What is compared by hash, and what travels as zeros (X1)."""

from __future__ import annotations

import itertools
import random

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from nbdmirror.codec import repl
from nbdmirror.codec.hashing import BLOCK, HASH_SIZE, KEY_SIZE, count, different, digests, zero_runs
from nbdmirror.codec.regions import Extent, pack_region, parse_hashes, parse_region
from nbdmirror.codec.repl import Frame, Type
from nbdmirror.errors import PeerError

KEY = bytes(range(KEY_SIZE))


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 7])
def test_one_hash_for_each_step(size: int) -> None:
    data = random.Random(size).randbytes(size)
    found = digests(data, BLOCK, KEY)
    assert len(found) == count(size, BLOCK) * HASH_SIZE
    for index in range(count(size, BLOCK)):
        piece = data[index * BLOCK :][:BLOCK]
        assert found[index * HASH_SIZE :][:HASH_SIZE] == digests(piece, BLOCK, KEY)


def test_a_hash_is_gmac_of_the_data() -> None:
    """Against a GCM that is spelled out (NIST SP 800-38D, 6.4): GHASH by shifts, E(K, .) by ECB."""
    ecb = Cipher(algorithms.AES(KEY), modes.ECB()).encryptor()
    subkey = int.from_bytes(ecb.update(bytes(16)))
    mask = int.from_bytes(ecb.update(bytes(12) + b"\0\0\0\1"))
    data = random.Random(4).randbytes(100)
    total = 0
    for at in (0, 16, 32, 48, 64, 80, 96):
        total = _times(total ^ int.from_bytes(data[at : at + 16].ljust(16, b"\0")), subkey)
    total = _times(total ^ len(data) * 8 << 64, subkey)
    assert digests(data, BLOCK, KEY) == (total ^ mask).to_bytes(16)


def _times(x: int, y: int) -> int:
    """The product in GF(2^128), its bits in GCM's order (6.3)."""
    product = 0
    for bit in range(127, -1, -1):
        if x >> bit & 1:
            product ^= y
        y = y >> 1 ^ (0xE1 << 120 if y & 1 else 0)
    return product


def test_another_key_makes_other_hashes() -> None:
    """X1: what a tenant finds out about one connection's hashes says nothing of another's."""
    data = random.Random(3).randbytes(3 * BLOCK)
    ours, theirs = digests(data, BLOCK, KEY), digests(data, BLOCK, bytes(KEY_SIZE))
    assert different(ours, theirs) == b"\1\1\1"


def test_different_names_the_blocks_that_changed() -> None:
    data = bytearray(random.Random(1).randbytes(8 * BLOCK))
    before = digests(data, BLOCK, KEY)
    for block in (0, 3, 7):
        data[block * BLOCK + 5] ^= 1
    assert different(digests(data, BLOCK, KEY), before) == bytes((1, 0, 0, 1, 0, 0, 0, 1))


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
    head = repl.HASHES.pack(1, 0, 65536, 0, 100_000, KEY)
    assert parse_hashes(frame(Type.HASHES, head, bytes(32))).count == 2
    assert parse_hashes(frame(Type.HASHES, head, bytes(32))).key == KEY
    assert parse_hashes(frame(Type.HASHES, head)).hashes.nbytes == 0
    for wrong in (bytes(16), bytes(33), bytes(48)):
        with pytest.raises(PeerError):
            parse_hashes(frame(Type.HASHES, head, wrong))
    verify = repl.VERIFY.pack(1, 0, 65536, 0, 100_000, KEY, 7)
    assert parse_hashes(frame(Type.VERIFY, verify, bytes(32))).seq == 7
    with pytest.raises(PeerError):
        parse_hashes(frame(Type.VERIFY, verify))
    with pytest.raises(PeerError):
        parse_hashes(frame(Type.HASHES, repl.HASHES.pack(1, 0, 0, 0, 1, KEY)))
