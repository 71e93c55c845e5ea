"""What files in the kernel's page cache are made to let go of, and to have again (O16)."""

from __future__ import annotations

import asyncio
import os
from mmap import PAGESIZE
from pathlib import Path

import pytest

from nbdmirror.config import MIB
from nbdmirror.edge.files import LinuxDisk


def test_what_a_first_write_let_go_comes_back_with_the_first_read(tmp_path: Path) -> None:
    """A load that reads and writes must not wait for the disk page by page, for what was cached."""
    path, size = tmp_path / "facet", 8 * MIB
    with path.open("wb") as new:
        new.write(os.urandom(size))
        os.fsync(new.fileno())  # what is dirty is not let go
    disk = LinuxDisk()
    file = disk.open(str(path), scattered=True)
    assert file.try_pread(0, size) is not None
    file.pwrite(0, bytes(4096))
    cache = disk.threads.of(path.stat()).cache
    cache.submit(int).result()  # it does one thing after the other
    if file.try_pread(3 * MIB, 4096) is not None:  # the folio that is written to stays
        pytest.skip("this file system lets go of nothing")
    cache.submit(int).result()
    assert file.try_pread(2 * MIB, 2 * MIB) is not None
    assert file.try_pread(4 * MIB, 4 * MIB) is not None  # of another stretch
    file.close()
    disk.close()


def test_a_range_is_forgotten_to_its_last_page(tmp_path: Path) -> None:
    """O16: a file may be longer than its volume, whose size need not be whole pages: what a failed
    sync left in the page where the volume ends would stay in the cache only."""
    disk = LinuxDisk()
    file = disk.open(f"{tmp_path}/longer", create=True)
    for page in range(4):  # of which the kernel makes no larger folio
        file.pwrite(page * PAGESIZE, bytes(PAGESIZE))
        asyncio.run(file.sync())
    assert file.try_pread(PAGESIZE, 512) is not None
    asyncio.run(file.forget_range(0, PAGESIZE + 512))
    # From the last to the first: to look at a page may have the kernel read it and those behind it.
    third, second, first = (file.try_pread(page * PAGESIZE, 512) for page in (2, 1, 0))
    if first is not None:
        pytest.skip("this file system lets go of nothing")
    assert third is not None and second is None
    file.close()
    disk.close()
