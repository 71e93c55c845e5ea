"""Whether two local facets are better written one after the other, or at once: a write each in the
page cache of a file of its own, by the event loop's thread, and by it and another one.
``python -m tests.bench.facets``; medians of interleaved runs, in microseconds for both facets.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import uvloop

from nbdmirror.codec.batch import LENGTH_MAX
from nbdmirror.codec.batchpure import PLACE
from nbdmirror.edge.files import LinuxDisk, LinuxFile
from tests.bench import report

MIB = 1 << 20
SIZE = 256 * MIB
WRITES = ((16, 4096), (64, 4096), (1, 256 << 10), (1, MIB))
"""(how many at a time, of so many bytes)."""
TURNS = 9
REPEATS = 100


async def _both(
    files: list[LinuxFile], count: int, length: int, pool: ThreadPoolExecutor | None
) -> float:
    """Microseconds that one batch takes in both files, the second by a thread of ``pool``."""
    block = os.urandom(count * length)
    source = random.Random(count)
    offsets = [source.randrange(SIZE // length) * length for _ in range(count)]
    places = b"".join(PLACE.pack(o, i * length, length, 0) for i, o in enumerate(offsets))

    def land(file: LinuxFile) -> None:
        if length <= LENGTH_MAX:
            file.pwrite_places(block, places, 0)
        else:
            file.pwrite(offsets[0], block)

    began = time.perf_counter()
    for _ in range(REPEATS):
        first, second = files
        other = None
        if pool is not None:
            other = asyncio.get_running_loop().run_in_executor(pool, land, second)
        land(first)
        if other is None:
            land(second)
        else:
            await other
    return (time.perf_counter() - began) / REPEATS * 1e6


async def _measure(directory: Path) -> dict[str, dict[str, list[float]]]:
    disk = LinuxDisk()
    files = []
    for number in range(2):
        path = str(directory / f"facet{number}")
        with open(path, "wb") as file:
            for _ in range(SIZE // MIB):
                file.write(os.urandom(MIB))
            os.fsync(file.fileno())
        files.append(disk.open(path, scattered=True))
    pools = {"one after the other": None, "at once": ThreadPoolExecutor(1)}
    samples: dict[str, dict[str, list[float]]] = {}
    for count, length in WRITES:
        name = f"{count} x {length >> 10} KiB"
        found = samples[name] = {way: [] for way in pools}
        for turn in range(TURNS + 1):
            for way, pool in pools.items():
                taken = await _both(files, count, length, pool)
                if turn:  # the first warms the page cache up
                    found[way].append(taken)
    return samples


def main() -> int:
    """Measures, prints the table, stores the samples."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as directory,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        samples = runner.run(_measure(Path(directory)))
    print("| | one after the other | at once |\n|---|---:|---:|")
    for name, ways in samples.items():
        row = [f"{median(values):,.0f}" for values in ways.values()]
        print(f"| {name} | {' | '.join(row)} |")
    report.keep("facets", {"samples": samples})
    return 0


if __name__ == "__main__":
    sys.exit(main())
