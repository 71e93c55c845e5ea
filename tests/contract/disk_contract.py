"""What every ``ports.Disk`` and ``ports.File`` must do; run by ``test_disk_contract``.

A simulator that keeps another contract than Linux proves nothing: each test here runs against both.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
from collections.abc import Coroutine
from typing import Any, Protocol

import pytest

from nbdmirror.codec.batchpure import PLACE
from nbdmirror.codec.hashing import KEY_SIZE, digests
from nbdmirror.config import KIB, MIB
from nbdmirror.ports import Disk, File

KEY = bytes(range(KEY_SIZE))


class DiskWorld(Protocol):
    """One implementation, with what a test needs around it."""

    disk: Disk
    directory: str

    def run(self, main: Coroutine[Any, Any, Any]) -> Any:
        """Runs a coroutine to its end on the loop that belongs to the implementation."""

    def fail_next_sync(self) -> None:
        """The next fdatasync ends with EIO, whichever file it is for; later ones would succeed."""

    def small(self, capacity: int) -> tuple[Disk, str]:
        """A disk of about that many bytes and a directory on it; skips where there is none."""


def new_file(world: DiskWorld, content: bytes = b"", name: str = "file") -> File:
    file = world.disk.open(f"{world.directory}/{name}", create=True)
    if content:
        file.pwrite(0, content)
    return file


async def settled(file: File, offset: int, length: int) -> bytes:
    """What ``try_pread`` says, asked until it says something, with reads in between."""
    for _ in range(100):
        data = file.try_pread(offset, length)
        if data is not None:
            return data
        await file.read(offset, length)
    return await file.read(offset, length)


class FileContract:
    def test_reads_what_was_written(self, world: DiskWorld) -> None:
        content = random.Random(1).randbytes(20_000)
        file = new_file(world, content)
        assert file.size() == 20_000
        for offset, length in ((0, 20_000), (0, 0), (4095, 2), (513, 8000), (19_999, 1)):
            expected = content[offset : offset + length]
            assert file.pread(offset, length) == expected
            assert world.run(file.read(offset, length)) == expected
            assert world.run(settled(file, offset, length)) == expected
        file.close()

    def test_identity_is_of_the_file_not_of_its_name(self, world: DiskWorld) -> None:
        """Empty where it cannot be told; the name of a removed file may come back with another."""
        path = f"{world.directory}/named"
        file = world.disk.open(path, create=True)
        first = file.identity()
        file.pwrite(0, b"content")
        world.run(file.sync())
        file.close()
        world.disk.rename(path, f"{world.directory}/moved")
        file = world.disk.open(f"{world.directory}/moved")
        assert file.identity() == first
        file.close()
        world.disk.unlink(f"{world.directory}/moved")
        file = world.disk.open(path, create=True)
        assert file.identity() != first or not first
        file.close()

    def test_hashes_are_those_of_what_is_read(self, world: DiskWorld) -> None:
        content = random.Random(3).randbytes(700_000)
        file = new_file(world, content)
        cases = ((0, 700_000, 4096), (513, 8000, 4096), (0, 0, 512), (0, 700_000, 1 << 20))
        for offset, length, step in (*cases, (699_000, 1000, 4096), (0, 600_000, 100_000)):
            expected = digests(file.pread(offset, length), step, KEY)
            assert world.run(file.hashes(offset, length, step, KEY)) == expected
        file.close()

    def test_nothing_is_said_of_what_lies_past_the_end(self, world: DiskWorld) -> None:
        """I5, M14: a device that was pulled out, or was made smaller, ends sooner than it did."""
        file = new_file(world, b"abc" * 2000)
        file.truncate(3)
        for offset, length in ((1, 5), (100, 3), (0, 6000)):
            for read in (
                lambda at, size: file.pread(at, size),
                lambda at, size: world.run(file.read(at, size)),
                lambda at, size: world.run(file.hashes(at, size, 512, KEY)),
                lambda at, size: world.run(file.punch(at, size)),
                lambda at, size: world.run(file.zero(at, size)),
            ):
                with pytest.raises(OSError) as caught:
                    read(offset, length)
                assert caught.value.errno == errno.EIO
            with contextlib.suppress(OSError):
                assert file.try_pread(offset, length) is None
        assert list(file.data_ranges(0, 6000)) == [(0, 3), (3, 5997)]
        assert list(file.data_ranges(4096, 1000)) == [(4096, 1000)]
        assert file.pread(0, 3) == b"abc" and file.pread(3, 0) == b""
        assert file.size() == 3
        file.close()

    def test_overlapping_writes_in_order(self, world: DiskWorld) -> None:
        rng = random.Random(2)
        file = new_file(world)
        model = bytearray(64 * KIB)
        for _ in range(200):
            offset, data = rng.randrange(60_000), rng.randbytes(rng.randrange(1, 5000))
            file.pwrite(offset, memoryview(data))
            model[offset : offset + len(data)] = data
        assert file.pread(0, file.size()) == model[: file.size()]
        file.close()

    def test_pwritev_takes_more_parts_than_iov_max(self, world: DiskWorld) -> None:
        parts = [index.to_bytes(3, "big") for index in range(2500)]
        file = new_file(world)
        file.pwritev(7, parts)
        file.pwritev(7 + 7500, [b"", bytearray(b"xy"), memoryview(b"z")])
        file.pwritev(0, [])
        assert file.pread(7, 7503) == b"".join(parts) + b"xyz"
        file.close()

    @pytest.mark.parametrize("scattered", [False, True])
    def test_pieces_go_to_their_places_in_order(self, world: DiskWorld, scattered: bool) -> None:
        """Those of one volume; where two overlap the later one counts."""
        file = new_file(world, bytes(10_000))
        file.close()
        file = world.disk.open(f"{world.directory}/file", scattered=scattered)
        places = [(5000, 0, 100, 3), (50, 10, 20, 2), (4990, 100, 50, 3), (5 << 20, 7, 9, 3)]
        block = random.Random(2).randbytes(200)
        file.pwrite_places(block, b"".join(PLACE.pack(*place) for place in places), 3)
        content = bytearray(bytes((5 << 20) + 9))
        for offset, at, length, volume in places:
            if volume == 3:
                content[offset : offset + length] = block[at : at + length]
        assert file.pread(0, len(content)) == content
        file.close()
        with pytest.raises(OSError) as caught:
            file.pwrite_places(block, PLACE.pack(0, 0, 1, 0), 0)
        assert caught.value.errno == errno.EBADF

    def test_large_writes_are_awaited(self, world: DiskWorld) -> None:
        content = random.Random(3).randbytes(3 * MIB)
        file = new_file(world)
        world.run(file.write(5, content))
        assert world.run(file.read(5, len(content))) == content
        world.run(file.sync())
        file.close()

    def test_truncate_cuts_and_extends_with_zeros(self, world: DiskWorld) -> None:
        file = new_file(world, b"x" * 10_000)
        file.truncate(5000)
        assert file.size() == 5000
        file.truncate(9000)
        assert file.pread(0, 9000) == b"x" * 5000 + bytes(4000)
        file.close()

    def test_what_a_healthy_disk_is_made_to_forget_is_there(self, world: DiskWorld) -> None:
        """O16: what is not written out yet is before that."""
        content = random.Random(5).randbytes(64 * KIB)
        file = new_file(world, content)
        world.run(file.forget())
        assert world.run(file.read(0, len(content))) == content
        file.pwrite(4096, b"new" * 4096)
        world.run(file.forget_range(0, len(content)))
        world.run(file.sync())
        model = content[:4096] + b"new" * 4096 + content[4 * 4096 :]
        assert world.run(file.read(0, len(content))) == model
        file.close()

    @pytest.mark.parametrize("name", ["punch", "zero"])
    def test_cleared_ranges_read_as_zeros(self, world: DiskWorld, name: str) -> None:
        content = random.Random(4).randbytes(64 * KIB)
        file = new_file(world, content)
        model = bytearray(content)
        for offset, length in ((4096, 8192), (100, 50), (20_001, 9999), (60_000, 5536), (0, 0)):
            world.run(getattr(file, name)(offset, length))
            model[offset : offset + length] = bytes(length)
            assert file.pread(0, len(model)) == model
        assert file.size() == len(model), "the length stays"
        file.close()

    def test_data_ranges_cover_all_data(self, world: DiskWorld) -> None:
        file = new_file(world)
        file.truncate(MIB)
        file.pwrite(256 * KIB, b"a" * 8192)
        file.pwrite(512 * KIB + 5, b"b")
        ranges = list(file.data_ranges(0, MIB))
        for offset, length in ((256 * KIB, 8192), (512 * KIB + 5, 1)):
            assert any(o <= offset and offset + length <= o + n for o, n in ranges)
        assert ranges == sorted(ranges)
        assert all(o >= 0 and n > 0 and o + n <= MIB for o, n in ranges)
        assert list(file.data_ranges(258 * KIB, 1024)) == [(258 * KIB, 1024)], "clipped"
        assert list(file.data_ranges(MIB, 0)) == []
        file.close()

    def test_holes_and_punched_ranges_are_not_data(self, world: DiskWorld) -> None:
        file = new_file(world)
        file.truncate(MIB)
        assert list(file.data_ranges(0, MIB)) == []
        file.pwrite(0, b"c" * MIB)
        assert list(file.data_ranges(0, MIB)) == [(0, MIB)]
        world.run(file.punch(256 * KIB, 512 * KIB))
        assert list(file.data_ranges(0, MIB)) == [(0, 256 * KIB), (768 * KIB, 256 * KIB)]
        file.close()

    def test_allocate_writes_zeros_and_takes_the_space(self, world: DiskWorld) -> None:
        """O18: no size or extent change is left for later."""
        file = new_file(world)
        world.run(file.allocate(MIB + 777))
        assert file.size() == MIB + 777
        assert list(file.data_ranges(0, MIB + 777)) == [(0, MIB + 777)]
        assert file.pread(0, MIB + 777) == bytes(MIB + 777)
        file.close()

    def test_allocate_on_a_full_disk(self, world: DiskWorld) -> None:
        """Fault 12: the space that is promised is there, or ENOSPC at once."""
        disk, directory = world.small(512 * KIB)
        file = disk.open(f"{directory}/log", create=True)
        with pytest.raises(OSError) as caught:
            world.run(file.allocate(MIB))
        assert caught.value.errno == errno.ENOSPC
        file.close()
        disk.unlink(f"{directory}/log")
        file = disk.open(f"{directory}/log", create=True)
        world.run(file.allocate(128 * KIB))
        file.close()

    def test_write_on_a_full_disk(self, world: DiskWorld) -> None:
        """Faults 10, 11: a write that does not fit raises; the file still works."""
        disk, directory = world.small(512 * KIB)
        file = disk.open(f"{directory}/facet", create=True)
        with pytest.raises(OSError) as caught:
            file.pwrite(0, b"d" * MIB)
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(OSError):
            file.pwritev(0, [b"e" * KIB] * 2000)
        with pytest.raises(OSError, match=r"[Nn]o space"):
            file.pwrite_places(
                b"e" * KIB, b"".join(PLACE.pack(at * KIB, 0, KIB, 0) for at in range(2000)), 0
            )
        with pytest.raises(OSError):
            world.run(file.write(0, b"f" * MIB))
        file.pwrite(0, b"g")
        assert file.pread(0, 1) == b"g"
        file.close()

    def test_failed_sync_is_final(self, world: DiskWorld) -> None:
        """O16, fault 9: the kernel would say that the second sync succeeded."""
        file = new_file(world, b"data")
        world.fail_next_sync()
        for _ in range(3):
            with pytest.raises(OSError) as caught:
                world.run(file.sync())
            assert caught.value.errno == errno.EIO
        other = new_file(world, b"data", "other")
        world.run(other.sync())
        file.close()
        other.close()

    def test_failed_sync_is_final_for_those_that_wait_too(self, world: DiskWorld) -> None:
        """O16: the kernel reports a failure to one of two concurrent syncs only."""
        file = new_file(world, b"data")

        async def both() -> list[Any]:
            return list(await asyncio.gather(file.sync(), file.sync(), return_exceptions=True))

        world.fail_next_sync()
        results = world.run(both())
        assert any(isinstance(result, OSError) for result in results)
        with pytest.raises(OSError):
            world.run(file.sync())
        file.close()

    def test_cancelled_calls_leave_the_file_usable(self, world: DiskWorld) -> None:
        file = new_file(world, b"data")

        async def main() -> None:
            task = asyncio.ensure_future(file.sync())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await file.sync()

        world.run(main())
        assert file.pread(0, 4) == b"data"
        file.close()

    def test_closed_file_answers_nothing(self, world: DiskWorld) -> None:
        file = new_file(world, b"data")
        file.close()
        file.close()
        for call in (lambda: file.pread(0, 1), lambda: file.pwrite(0, b"x"), file.size):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.EBADF
        with pytest.raises(OSError):
            world.run(file.sync())

    def test_read_only_file_refuses_writes(self, world: DiskWorld) -> None:
        new_file(world, b"data").close()
        file = world.disk.open(f"{world.directory}/file", read_only=True)
        assert not file.block_device
        with pytest.raises(OSError):
            file.pwrite(0, b"x")
        assert file.pread(0, 4) == b"data"
        file.close()


class DirectoryContract:
    def test_create_refuses_what_is_there(self, world: DiskWorld) -> None:
        path = f"{world.directory}/file"
        assert not world.disk.exists(path)
        with pytest.raises(FileNotFoundError):
            world.disk.open(path)
        new_file(world, b"data").close()
        assert world.disk.exists(path)
        with pytest.raises(FileExistsError):
            world.disk.open(path, create=True)
        assert world.disk.open(path).pread(0, 4) == b"data"

    def test_create_needs_its_directory(self, world: DiskWorld) -> None:
        with pytest.raises(FileNotFoundError):
            world.disk.open(f"{world.directory}/none/file", create=True)

    def test_directories_are_made_with_their_parents(self, world: DiskWorld) -> None:
        path = f"{world.directory}/a/b"
        world.disk.make_directory(path)
        world.disk.make_directory(path)
        assert world.disk.exists(path)
        for name in ("y", "x"):
            world.disk.open(f"{path}/{name}", create=True).close()
        assert world.disk.list(path) == ["x", "y"]
        assert world.disk.list(f"{world.directory}/a") == ["b"]
        with pytest.raises(FileNotFoundError):
            world.disk.list(f"{path}/none")
        with pytest.raises(FileExistsError):
            world.disk.make_directory(f"{path}/x")
        with pytest.raises(OSError):
            world.disk.open(path)

    def test_rename_replaces_and_unlink_removes(self, world: DiskWorld) -> None:
        """O18: the shape of every durable replacement of a small file."""
        disk, old, new = world.disk, f"{world.directory}/new", f"{world.directory}/state"
        new_file(world, b"old", "state").close()
        file = new_file(world, b"next", "new")
        world.run(file.sync())
        disk.rename(old, new)
        world.run(disk.sync_directory(world.directory))
        assert disk.list(world.directory) == ["state"]
        assert disk.open(new, read_only=True).pread(0, 4) == b"next"
        file.pwrite(0, b"same")
        seen = disk.open(new, read_only=True).pread(0, 4)
        assert seen == b"same", "an open file follows its name"
        disk.unlink(new)
        assert disk.list(world.directory) == []
        assert file.pread(0, 4) == b"same", "an open file outlives its name"
        with pytest.raises(FileNotFoundError):
            disk.unlink(new)
        with pytest.raises(FileNotFoundError):
            disk.rename(old, new)
        file.close()

    def test_remove_is_an_unlink_beside_the_loop(self, world: DiskWorld) -> None:
        path = f"{world.directory}/large"
        file = new_file(world, b"some", "large")
        world.run(world.disk.remove(path))
        assert world.disk.list(world.directory) == []
        assert file.pread(0, 4) == b"some", "an open file outlives its name"
        file.close()
        with pytest.raises(FileNotFoundError):
            world.run(world.disk.remove(path))

    def test_sync_directory_needs_a_directory(self, world: DiskWorld) -> None:
        with pytest.raises(OSError):
            world.run(world.disk.sync_directory(os.path.join(world.directory, "none")))
