"""The hashes by which regions and blocks are compared (X1, X6).

GMAC (NIST SP 800-38D) under a key that the primary draws for each connection and never shows: two
different contents of n bytes, made by somebody who does not know it, have one hash with a
probability of (n / 16 + 2) / 2^128. It is not told to anybody but the two nodes, so that one nonce
serves for all: nobody is to be kept from making a hash, but a tenant from making two blocks that
pass for the same. Several times as fast as BLAKE3 or SHA-256 where the processor multiplies
without carry. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from nbdmirror.ports import Buffer

HASH_SIZE = 16
KEY_SIZE = 16
_NONCE = bytes(12)
NOTHING = bytes(HASH_SIZE)
"""Contents have this hash as rarely as any other: one in 2^128."""
BLOCK = 4096
"""Inside a region that differs, blocks of this size are compared, and only those that differ
travel."""


def digests(data: Buffer, step: int, key: bytes) -> bytes:
    """One hash under ``key``, of KEY_SIZE bytes, for each ``step`` bytes of the data, in order; the
    last piece may be short."""
    view = memoryview(data)
    tag = AESGCM(key).encrypt  # of nothing, with the data beside it: what is left is the tag
    return b"".join([tag(_NONCE, b"", view[at : at + step]) for at in range(0, len(view), step)])


def count(length: int, step: int) -> int:
    """How many hashes ``digests`` makes of so many bytes."""
    return -(-length // step)


def different(ours: Buffer, theirs: Buffer) -> bytearray:
    """A byte for each hash of two equally long lists: 1 where they differ."""
    assert len(ours) == len(theirs)
    size = HASH_SIZE
    return bytearray(
        ours[at : at + size] != theirs[at : at + size] for at in range(0, len(ours), size)
    )


def agreed(lists: Sequence[bytes]) -> bytes:
    """Equally long lists of hashes as one: where they differ, a hash that nothing has."""
    first, *others = lists
    if all(other == first for other in others):
        return first
    result = bytearray(first)
    for at in range(0, len(first), HASH_SIZE):
        here = slice(at, at + HASH_SIZE)
        if any(other[here] != first[here] for other in others):
            result[here] = NOTHING
    return bytes(result)


def is_zeros(data: Buffer) -> bool:
    """Whether there is nothing but zeros."""
    view = memoryview(data)
    # Most data tells by its first byte.
    return not len(view) or (not view[0] and view.tobytes() == bytes(len(view)))


def zero_runs(data: Buffer) -> list[tuple[int, int, bool]]:
    """(offset, length, zeros) runs that cover the data, in whole blocks but for its end."""
    view = memoryview(data)
    size = len(view)
    firsts = view[::BLOCK].tobytes()
    zeros = bytearray(len(firsts))
    at = firsts.find(0)
    while at >= 0:  # only a block that begins with a zero can be one of zeros
        zeros[at] = is_zeros(view[at * BLOCK : (at + 1) * BLOCK])
        at = firsts.find(0, at + 1)
    runs: list[tuple[int, int, bool]] = []
    start = 0
    while start < len(zeros):
        end = zeros.find(1 - zeros[start], start)
        end = len(zeros) if end < 0 else end
        length = min(end * BLOCK, size) - start * BLOCK
        runs.append((start * BLOCK, length, bool(zeros[start])))
        start = end
    return runs
