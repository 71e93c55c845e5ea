"""One file under every kind of access, held against a model, as fsx does it: writes, reads, maps,
truncation up and down, holes, at any offset and length.

``exerciser.py FILE STOP SEED`` goes on until the file STOP is there; prints how
many operations there were.

Exit code 1 says that the file held something else than what was written, or that a call failed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import sys

SIZE_MAX = 4 << 20
LENGTH_MAX = 128 << 10
SYNC_EVERY = 64
PUNCH_KEEP_SIZE = 0x03

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Exerciser:
    """The file and its model."""

    def __init__(self, path: str, seed: int) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self.model = bytearray()
        self.random = random.Random(seed)
        self.operations = 0

    def _range(self, limit: int) -> tuple[int, int]:
        offset = self.random.randrange(limit)
        return offset, min(self.random.randint(1, LENGTH_MAX), limit - offset)

    def write(self) -> None:
        """Anywhere, also past the end."""
        offset, length = self._range(SIZE_MAX)
        data = self.random.randbytes(length)
        assert os.pwrite(self.fd, data, offset) == length
        if offset > len(self.model):
            self.model.extend(bytes(offset - len(self.model)))
        self.model[offset : offset + length] = data

    def read(self) -> None:
        """Held against the model."""
        if self.model:
            offset, length = self._range(len(self.model))
            self._same(os.pread(self.fd, length, offset), offset, length)

    def map_read(self) -> None:
        """The same through a map."""
        if self.model:
            offset, length = self._range(len(self.model))
            with mmap.mmap(self.fd, len(self.model), prot=mmap.PROT_READ) as view:
                self._same(view[offset : offset + length], offset, length)

    def map_write(self) -> None:
        """Through a map, never past the end."""
        if self.model:
            offset, length = self._range(len(self.model))
            data = self.random.randbytes(length)
            with mmap.mmap(self.fd, len(self.model)) as view:
                view[offset : offset + length] = data
            self.model[offset : offset + length] = data

    def truncate(self) -> None:
        """Down or up."""
        size = self.random.randrange(SIZE_MAX)
        os.ftruncate(self.fd, size)
        if size > len(self.model):
            self.model.extend(bytes(size - len(self.model)))
        del self.model[size:]

    def punch(self) -> None:
        """A hole, which reads as zeros."""
        if self.model:
            offset, length = self._range(len(self.model))
            done = _libc.fallocate(self.fd, PUNCH_KEEP_SIZE, offset, length)
            assert done == 0, os.strerror(ctypes.get_errno())
            self.model[offset : offset + length] = bytes(length)

    def drop(self) -> None:
        """Synced and forgotten by the page cache: the next reads come from the device."""
        os.fsync(self.fd)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _same(self, data: bytes, offset: int, length: int) -> None:
        expected = self.model[offset : offset + length]
        if data != expected:
            at = next(i for i, (a, b) in enumerate(zip(data, expected, strict=False)) if a != b)
            raise AssertionError(f"operation {self.operations}: wrong from byte {offset + at} on")

    def run(self, stop: str) -> None:
        """Until ``stop`` is there; then all of it is held against the model, from the device."""
        kinds = [self.write] * 4 + [self.read] * 3 + [self.map_read, self.map_write, self.punch]
        while not os.path.exists(stop):
            self.operations += 1
            if self.operations % SYNC_EVERY == 0:
                self.drop()
            self.random.choice([*kinds, self.truncate] if self.operations % 8 == 0 else kinds)()
        self.drop()
        assert os.fstat(self.fd).st_size == len(self.model)
        self._same(os.pread(self.fd, len(self.model), 0), 0, len(self.model))


def main(path: str, stop: str, seed: str) -> int:
    """See above."""
    exerciser = Exerciser(path, int(seed))
    try:
        exerciser.run(stop)
    except (AssertionError, OSError, StopIteration) as error:
        print(f"{path}: {error!r}")
        return 1
    print(exerciser.operations)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
