"""``disk_contract`` against Linux files and against the simulated disk."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdmirror.edge import files
from nbdmirror.edge.files import LinuxDisk
from nbdmirror.ports import Disk
from tests.contract.disk_contract import (
    DirectoryContract,
    DiskWorld,
    FileContract,
)
from tests.sim.disk import SimDisk
from tests.sim.faults import Fault, Kind, Timing
from tests.sim.loop import SimLoop


class LinuxWorld:
    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._linux = LinuxDisk(threads_max=4)
        self.disk: Disk = self._linux
        self.directory = str(directory)
        self._loop = asyncio.new_event_loop()
        self._monkeypatch = monkeypatch
        self._mounted: list[str] = []

    def run(self, main: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(main)

    def fail_next_sync(self) -> None:
        real = os.fdatasync

        def failing(fd: int) -> None:
            self._monkeypatch.setattr(files, "fdatasync", real)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        self._monkeypatch.setattr(files, "fdatasync", failing)

    def small(self, capacity: int) -> tuple[Disk, str]:
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("mounting a small tmpfs needs root")
        path = f"{self.directory}/small"
        os.mkdir(path)
        command = ["mount", "-t", "tmpfs", "-o", f"size={capacity}", "none", path]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting is not allowed here")
        self._mounted.append(path)
        return self.disk, path

    def close(self) -> None:
        self._linux.close()
        self._loop.close()
        for path in self._mounted:
            subprocess.run(["umount", path], check=True)


class SimWorld:
    def __init__(self, miss: float) -> None:
        self._sim = SimDisk("alpha", 1, timing=Timing(miss=miss))
        self.disk: Disk = self._sim
        self.directory = "/state"
        self._loop = SimLoop()
        self.disk.make_directory(self.directory)

    def run(self, main: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(main)

    def fail_next_sync(self) -> None:
        def faults(operation: str, _path: str, _nth: int) -> Fault | None:
            if operation != "sync":
                return None
            self._sim.faults = None
            return Fault(Kind.LOSE)

        self._sim.faults = faults

    def small(self, capacity: int) -> tuple[Disk, str]:
        disk = SimDisk("small", 1, capacity=capacity)
        disk.make_directory("/small")
        return disk, "/small"

    def close(self) -> None:
        assert self._loop.errors == []
        self._loop.close()


@pytest.fixture(params=["linux", "sim", "sim-misses"])
def world(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[DiskWorld]:
    made: LinuxWorld | SimWorld
    if request.param == "linux":
        made = LinuxWorld(tmp_path, monkeypatch)
    else:
        made = SimWorld(0.5 if request.param == "sim-misses" else 0.0)
    yield made
    made.close()


class TestFile(FileContract):
    pass


class TestDirectory(DirectoryContract):
    pass
