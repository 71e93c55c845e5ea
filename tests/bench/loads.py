"""What fio does to each subject, and the figures that one run gives."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.bench.subjects import Subject
from tests.integration.process import ProcessError
from tests.integration.tools import fio

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
GRACE_S = 60.0


@dataclass(frozen=True)
class Load:
    """One fio job. ``fsync``: a flush after so many writes. ``jobs``: connections. ``cold``: the
    page cache holds nothing of the files."""

    name: str
    rw: str
    block: int
    depth: int
    fsync: int = 0
    jobs: int = 1
    basic: bool = True
    cold: bool = False

    @property
    def writes(self) -> bool:
        """Whether it changes the volume, so that a mirror has work."""
        return "write" in self.rw or self.rw == "randrw"


def _loads() -> Iterator[Load]:
    for depth in (1, 16, 64, 256):
        basic = depth <= 64
        yield Load(f"4k random write, depth {depth}", "randwrite", 4096, depth, basic=basic)
    for depth in (1, 16, 64, 256):
        basic = depth <= 64
        yield Load(f"4k random read, depth {depth}", "randread", 4096, depth, basic=basic)
    for size in (64, 256):
        basic = size == 256
        yield Load(f"{size}k sequential write, depth 8", "write", size << 10, 8, basic=basic)
        yield Load(f"{size}k sequential read, depth 8", "read", size << 10, 8, basic=basic)
    yield Load("4k random read, depth 16, cold", "randread", 4096, 16, basic=False, cold=True)
    yield Load("256k sequential read, depth 8, cold", "read", 256 << 10, 8, basic=False, cold=True)
    yield Load("4k write, flush after each", "randwrite", 4096, 1, fsync=1)
    yield Load("4k write, flush after 16", "randwrite", 4096, 16, fsync=16, basic=False)
    yield Load("4k random 70/30, depth 16", "randrw", 4096, 16, basic=False)
    for jobs in (4, 16):
        name = f"4k random write, depth 16, {jobs} connections"
        yield Load(name, "randwrite", 4096, 16, jobs=jobs, basic=False)


ALL = list(_loads())


@dataclass(frozen=True)
class Sample:
    """The figures of one run: rates per second, latencies in microseconds.

    ``replicated`` is requests per second of load and drain together: what the copy keeps up with.
    ``written_per_byte``: what all processes together put into the page cache of disks, for each
    byte that clients wrote; the kernel counts the whole folio that a write is in, so one with a
    flush behind each small write counts hundreds of times what the disk is given.
    """

    iops: float
    bytes_s: float
    mean_us: float
    p50_us: float
    p99_us: float
    p999_us: float
    cpu_s: float
    cpu_s_per_gib: float
    rss_bytes: int
    drain_s: float
    replicated: float
    written_per_byte: float

    def as_dict(self) -> dict[str, float]:
        """For the JSON results."""
        return asdict(self)


def _cpu_s(subject: Subject) -> float:
    """Processor seconds of the subject's processes so far."""
    total = 0
    for process in subject.processes:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        total += sum(int(field) for field in fields[11:15])  # own and waited-for children's
    return total / TICKS


def _rss_bytes(subject: Subject) -> int:
    pages = 0
    for process in subject.processes:
        pages += int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * PAGE


def _written_bytes(subject: Subject) -> int:
    """What the subject's processes have written to files so far."""
    total = 0
    for process in subject.processes:
        lines = Path(f"/proc/{process.pid}/io").read_text().splitlines()
        total += int(dict(line.split(": ") for line in lines)["write_bytes"])
    return total


def _settle(subject: Subject, *, cold: bool) -> None:
    """Dirty pages are written out; every file is in the page cache, or nothing of any: the same
    for all."""
    os.sync()
    for path in subject.files:
        with path.open("rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while not cold and file.read(4 << 20):
                pass


@dataclass(frozen=True)
class _Used:
    """What a run took of the machine."""

    cpu_s: float
    rss_bytes: int
    written_bytes: int
    drain_s: float


def _sample(job: dict[str, Any], load: Load, used: _Used) -> Sample:
    sides = [job[side] for side in ("read", "write") if job[side]["total_ios"]]
    count = sum(side["total_ios"] for side in sides)
    main = max(sides, key=lambda side: int(side["total_ios"]))
    spread = main["clat_ns"]["percentile"]
    moved = sum(side["io_bytes"] for side in sides)
    elapsed_s = max(side["runtime"] for side in sides) / 1000
    return Sample(
        iops=count / elapsed_s,
        bytes_s=moved / elapsed_s,
        mean_us=main["clat_ns"]["mean"] / 1000,
        p50_us=spread["50.000000"] / 1000,
        p99_us=spread["99.000000"] / 1000,
        p999_us=spread["99.900000"] / 1000,
        cpu_s=used.cpu_s,
        cpu_s_per_gib=used.cpu_s / (moved / (1 << 30)),
        rss_bytes=used.rss_bytes,
        drain_s=used.drain_s,
        replicated=count / (elapsed_s + used.drain_s) if load.writes else 0.0,
        written_per_byte=used.written_bytes / written
        if (written := job["write"]["io_bytes"])
        else 0,
    )


def measure(subject: Subject, load: Load, seconds: float) -> Sample:
    """One run of one load against fresh processes."""
    _settle(subject, cold=load.cold)
    try:
        uri = subject.start()
        cpu_s, written = _cpu_s(subject), _written_bytes(subject)
        options: dict[str, object] = {"fsync": load.fsync} if load.fsync else {}
        if load.jobs > 1:
            options |= {"numjobs": load.jobs, "group_reporting": True}
        job = fio(
            uri,
            subject.directory,
            timeout=seconds + GRACE_S,
            rw=load.rw,
            bs=load.block,
            iodepth=load.depth,
            time_based=True,
            runtime=seconds,
            norandommap=True,
            randrepeat=0,
            **({"rwmixread": 70} if load.rw == "randrw" else {}),
            **options,
        )
        rss = _rss_bytes(subject)
        ended = time.monotonic()
        if load.writes:
            subject.drain()
        drain_s = time.monotonic() - ended
        used = _Used(
            cpu_s=_cpu_s(subject) - cpu_s,
            rss_bytes=rss,
            written_bytes=_written_bytes(subject) - written,
            drain_s=drain_s,
        )
        subject.stop()
        return _sample(job, load, used)
    except (AssertionError, OSError) as error:
        for process in subject.processes:
            process.kill()
        subject.processes.clear()
        raise ProcessError(f"{subject.name}, {load.name}: {error}") from error
