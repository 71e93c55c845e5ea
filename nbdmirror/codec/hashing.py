"""The hashes by which regions and blocks are compared (X1, X6).

The first half of SHA-256: cryptographic, so that a tenant cannot make two blocks that pass for
the same, and faster than other such hashes where the processor has instructions for it. Pure.
"""

from __future__ import annotations

import hashlib

from nbdmirror.ports import Buffer

HASH_SIZE = 16
BLOCK = 4096
"""Inside a region that differs, blocks of this size are compared, and only those that differ
travel."""

_ZEROS = bytes(BLOCK)


def digests(data: Buffer, step: int) -> bytes:
    """One hash for each ``step`` bytes of the data, in order; the last piece may be short."""
    view = memoryview(data)
    sha256 = hashlib.sha256
    return b"".join(
        [sha256(view[at : at + step]).digest()[:HASH_SIZE] for at in range(0, len(view), step)]
    )


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


def zero_runs(data: Buffer) -> list[tuple[int, int, bool]]:
    """(offset, length, zeros) runs that cover the data, in whole blocks but for its end."""
    view = memoryview(data)
    runs: list[tuple[int, int, bool]] = []
    size = len(view)
    start, kind = 0, False
    for at in range(0, size, BLOCK):
        block = view[at : at + BLOCK]
        zeros = block == (_ZEROS if len(block) == BLOCK else _ZEROS[: len(block)])
        if zeros is not kind:
            if at > start:
                runs.append((start, at - start, kind))
            start, kind = at, zeros
    if size > start:
        runs.append((start, size - start, kind))
    return runs
