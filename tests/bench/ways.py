"""Other ways for the data path, against the ones in use: io_uring, O_DIRECT, several loops.

``python -m tests.bench.ways``; medians of interleaved runs. What the product does not use is here
to say why. io_uring needs a binding (``pip install -e .[bench]``, as ``make bench`` does).

- A batch of 4 KiB writes to random places of a facet: ``pwrite_places``, a loop of system calls
  in C, against one submission of so many requests to an io_uring.
- An append to the log, alone and with the sync that a flush asks for: through the page cache, as it
  is, against O_DIRECT.
- Four connections that write 4 KiB at depth 16 into one daemon without a remote, against two into
  each of two such daemons: what two loops would bring at most, without a lock between them.
"""

from __future__ import annotations

import importlib
import mmap
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from nbdmirror.codec.batchpure import PLACE
from nbdmirror.edge.files import LinuxDisk
from tests.bench import report
from tests.bench.__main__ import source
from tests.bench.subjects import NbdmirrorAlone
from tests.integration.tools import fio

MIB = 1 << 20
SIZE = 256 * MIB
BLOCK = 4096
BATCH = 16
TURNS = 9
REPEATS = 200
APPENDS = (4096, 64 << 10)
SECONDS = 2.0
Ways = Mapping[str, Callable[[], None]]


def _interleaved(ways: Ways, repeats: int) -> dict[str, list[float]]:
    """Microseconds that each takes, turn by turn; the first turn warms up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(TURNS + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            for _ in range(repeats):
                way()
            if turn:
                found[name].append((time.perf_counter() - began) / repeats * 1e6)
    return found


def _batches(path: Path) -> dict[str, list[float]]:
    """One batch into a facet."""
    liburing: Any = importlib.import_module("liburing")
    file = LinuxDisk().open(str(path), scattered=True)
    fd = os.open(path, os.O_RDWR)
    ring = liburing.Ring()
    liburing.io_uring_queue_init(2 * BATCH, ring)
    block = os.urandom(BATCH * BLOCK)
    pieces = [block[at : at + BLOCK] for at in range(0, len(block), BLOCK)]
    drawn = random.Random(1)

    def offsets() -> list[int]:
        return [drawn.randrange(SIZE // BLOCK) * BLOCK for _ in range(BATCH)]

    def in_use() -> None:
        places = (PLACE.pack(o, i * BLOCK, BLOCK, 0) for i, o in enumerate(offsets()))
        file.pwrite_places(block, b"".join(places), 0)

    def uring() -> None:
        for offset, data in zip(offsets(), pieces, strict=True):
            liburing.io_uring_prep_write(liburing.io_uring_get_sqe(ring), fd, data, offset)
        liburing.io_uring_submit_and_wait(ring, BATCH)
        liburing.io_uring_cq_advance(ring, BATCH)

    found = _interleaved({"pwrite_places": in_use, "io_uring": uring}, REPEATS)
    liburing.io_uring_queue_exit(ring)
    os.close(fd)
    file.close()
    return found


def _appends(path: Path, length: int, *, sync: bool) -> dict[str, list[float]]:
    """One append to a log."""
    with path.open("r+b") as file:
        cached, direct = file.fileno(), os.open(path, os.O_RDWR | os.O_DIRECT)
        memory = mmap.mmap(-1, length)
        memory.write(os.urandom(length))
        at = {cached: 0, direct: SIZE // 2}

        def append(fd: int) -> None:
            os.pwritev(fd, (memory,), at[fd])
            at[fd] += length
            if at[fd] % (SIZE // 2) == 0:
                at[fd] -= SIZE // 2
            if sync:
                os.fdatasync(fd)

        ways = {"page cache": lambda: append(cached), "O_DIRECT": lambda: append(direct)}
        found = _interleaved(ways, REPEATS // (4 if sync else 1))
        os.close(direct)
    return found


def _loops(directory: Path) -> dict[str, list[float]]:
    """Writes a second of four clients."""
    content = source(directory, SIZE // MIB)
    daemons = []
    for number in range(2):
        daemons.append(NbdmirrorAlone(directory / str(number)))
        daemons[-1].prepare(content)
    found: dict[str, list[float]] = {"one loop": [], "two loops": []}
    for turn in range(5 + 1):
        for name, used in (("one loop", daemons[:1]), ("two loops", daemons)):
            rates: list[float] = []

            def client(daemon: NbdmirrorAlone, jobs: int, rates: list[float] = rates) -> None:
                uri = daemon.cluster.primary.uri("data")
                job = fio(
                    uri,
                    daemon.directory,
                    rw="randwrite",
                    bs=BLOCK,
                    iodepth=16,
                    numjobs=jobs,
                    group_reporting=True,
                    time_based=True,
                    runtime=SECONDS,
                )
                rates.append(job["write"]["iops"])

            for daemon in used:
                daemon.start()
            clients = [
                threading.Thread(target=client, args=(daemon, 4 // len(used))) for daemon in used
            ]
            for one in clients:
                one.start()
            for one in clients:
                one.join()
            for daemon in used:
                daemon.stop()
            if turn:
                found[name].append(sum(rates))
    for daemon in daemons:
        daemon.close()
    return found


def main() -> int:
    """Measures, keeps and prints."""
    samples: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        path = Path(name) / "file"
        with path.open("wb") as file:
            for _ in range(SIZE // MIB):
                file.write(os.urandom(MIB))
            os.fsync(file.fileno())
        samples[f"{BATCH} writes of 4 KiB, us"] = _batches(path)
        for length in APPENDS:
            what = f"append of {length >> 10} KiB"
            samples[f"{what}, us"] = _appends(path, length, sync=False)
            samples[f"{what} and a sync, us"] = _appends(path, length, sync=True)
        samples["4 connections, writes/s"] = _loops(Path(name))
    for what, ways in samples.items():
        print(what, ", ".join(f"{way}: {median(found):,.0f}" for way, found in ways.items()))
    report.keep("ways", {"samples": samples})
    return 0


if __name__ == "__main__":
    sys.exit(main())
