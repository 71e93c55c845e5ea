"""What a resync costs, against copying: ``python -m tests.bench.resync``.

Two nodes on this host over loopback TCP, or through a proxy that takes so many MiB a second
(``--link 110``: a gigabit), one volume of random bytes, nothing else running. Both files have just
been read from end to end whenever a measurement begins. Each round, in turn:
``nbdcopy --flush`` from the primary's file to an ``nbdkit file`` on the secondary's (the same two
places), then resyncs of the whole volume (``resync --full``) where the secondary differs
everywhere, nowhere, and in 1 % of its 4 KiB blocks; everywhere twice: overwriting what is there, as
a first synchronisation does, and keeping the secondary's last consistent image, which costs it
another copy of the volume on its disk. Then the p99 of a client that writes 4 KiB at
depth 1, alone and during a resync. The table goes to standard output, the samples to
``tests/bench/results``.

The bars: a volume that differs everywhere at 0.7 of nbdcopy's speed; one that is the same 3 times
as fast as one that is copied, for 0.1 % of its bytes; 1 % changed: 1.3 times the changed bytes, and
hashes; a client's p99 at most twice what it is without.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from tests.bench import report
from tests.integration.cluster import Cluster, Volume
from tests.integration.process import free_port, wait_until
from tests.integration.proxy import Proxy
from tests.integration.tools import Fio

MIB = 1 << 20
BLOCK = 4096
REGION = 64 << 10
HASHES = 16 / REGION + 16 * 16 / REGION
"""Bytes of hashes for each byte of a volume, at most: of its regions, and of blocks."""


def _fill(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())


def _change(path: Path, size: int, part: float, seed: int) -> int:
    """Changes that part of the blocks at random; returns how many bytes these are."""
    blocks = random.Random(seed).sample(range(size // BLOCK), int(size // BLOCK * part))
    with path.open("r+b") as file:
        for block in blocks:
            file.seek(block * BLOCK)
            file.write(os.urandom(BLOCK))
        os.fsync(file.fileno())
    return len(blocks) * BLOCK


def _read_anew(*paths: Path) -> None:
    """All of these files is in the page cache as readahead brings it, and clean. What wrote to them
    before, a client 4 KiB at a time or a copy, would leave it in pages of another size, which one
    measurement would find and the next one not."""
    os.sync()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.read(MIB):
                pass


def _nbdcopy(source: Path, target: Path, link: float | None) -> float:
    """Seconds that nbdcopy takes from a file here to one behind a server, over that link."""
    shutil.copyfile(target, copy := target.with_suffix(".nbdkit"))
    port = free_port()
    command = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "file", str(copy)]
    server = subprocess.Popen(command)
    proxy = Proxy(f"127.0.0.1:{port}")
    try:
        wait_until("nbdkit listens", lambda: _listens(port))
        if link is not None:
            proxy.shape(rate=link)
            port = proxy.port
        _read_anew(source, copy)
        began = time.monotonic()
        uri = f"nbd://127.0.0.1:{port}"
        # The proxy gives each connection its rate; a resync has one.
        connections = ["--connections=1"] if link is not None else []
        subprocess.run(["nbdcopy", "--flush", *connections, "--", str(source), uri], check=True)
        return time.monotonic() - began
    finally:
        proxy.close()
        server.terminate()
        server.wait()
        copy.unlink()


def _listens(port: int) -> bool:
    done = subprocess.run(["nbdinfo", "--size", f"nbd://127.0.0.1:{port}"], capture_output=True)
    return done.returncode == 0


class Bench:
    """One pair of nodes."""

    def __init__(self, directory: Path, size: int, link: float | None) -> None:
        self.directory = directory
        self.link = link
        self.size = size
        self.cluster = Cluster(
            directory / "nodes",
            volumes=[Volume(size=size)],
            log_size=1024 * MIB,
            proxied=link is not None,
            tuning={},
        )
        self.cluster.create()
        self.ours = self.cluster.primary.facets("data")[0]
        self.theirs = self.cluster.secondary.facets("data")[0]
        _fill(self.ours, size)
        shutil.copyfile(self.ours, self.theirs)
        for node in self.cluster.nodes:
            node.start()
        self.cluster.wait_in_sync(300)
        if link is not None:
            self.cluster.proxy.shape(rate=link)

    def resync(self, change: Callable[[], int], *, keep: bool = True) -> dict[str, float]:
        """Changes the secondary's facet while it is down; times a full resync. ``keep``: the image
        that the secondary has before it (X2)."""
        cluster = self.cluster
        cluster.secondary.stop()
        changed = change()
        _read_anew(self.ours, self.theirs)
        flag = str(keep).lower()
        cluster.secondary.write_config(extra=f"[snapshots]\nbefore_resync = {flag}\n")
        cluster.secondary.start()
        cluster.primary.until("is connected", lambda one: one["link"] == "connected")
        cluster.wait_in_sync()
        before = cluster.primary.remote()["bytes_sent"]
        began = time.monotonic()
        cluster.primary.rpc("resync", remote="beta", full=True)
        while True:
            entry = cluster.primary.rpc("status")["remotes"][0]
            if entry["state"] == "synchronised" and entry["dirty"]["regions"] == 0:
                break
            time.sleep(0.02)  # the figure is no finer; a look costs the processor too
        seconds = time.monotonic() - began
        sent = cluster.primary.remote()["bytes_sent"] - before
        return {"seconds": seconds, "sent": sent, "changed": changed}

    def everywhere(self) -> int:
        """Nothing is the same."""
        _fill(self.theirs, self.size)
        return self.size

    def latency(self, seconds: float, *, busy: bool) -> dict[str, float]:
        """The client's latency alone, or while the volume is compared again and again."""
        resyncs = 0
        load: dict[str, object] = {
            "rw": "randwrite",
            "bs": BLOCK,
            "iodepth": 1,
            "size": self.size,
            "time_based": True,
            "runtime": seconds,
            "norandommap": True,
        }
        node = self.cluster.primary
        with Fio(node.uri(), self.directory, **load) as client:
            while client.running:
                if busy and node.rpc("status")["remotes"][0]["resync"] is None:
                    node.rpc("resync", remote="beta", full=True)
                    resyncs += 1
                time.sleep(0.2)  # between two looks: they cost the processor too
            job = client.result()
        self.cluster.wait_in_sync(300)
        spread = job["write"]["clat_ns"]["percentile"]
        return {
            "p50_us": spread["50.000000"] / 1000,
            "p99_us": spread["99.000000"] / 1000,
            "p999_us": spread["99.900000"] / 1000,
            "iops": job["write"]["iops"],
            "resyncs": resyncs,
        }


def _measure(bench: Bench, rounds: int, seconds: float) -> dict[str, list[dict[str, float]]]:
    size, theirs = bench.size, bench.theirs
    samples: dict[str, list[dict[str, float]]] = {}

    def add(name: str, sample: dict[str, float]) -> None:
        samples.setdefault(name, []).append(sample)
        shown = ", ".join(f"{key} {value:,.6g}" for key, value in sample.items())
        print(f"{name}: {shown}", file=sys.stderr, flush=True)

    for turn in range(rounds):
        add("nbdcopy", {"seconds": _nbdcopy(bench.ours, theirs, bench.link)})
        add("everywhere", bench.resync(bench.everywhere, keep=False))
        add("everywhere, image kept", bench.resync(bench.everywhere))
        add("nowhere", bench.resync(lambda: 0))
        add("1 %", bench.resync(lambda: _change(theirs, size, 0.01, turn)))  # noqa: B023
        add("client alone", bench.latency(seconds, busy=False))
        add("client, resync", bench.latency(seconds, busy=True))
    return samples


def _table(samples: dict[str, list[dict[str, float]]], size: int) -> str:
    def mid(name: str, key: str) -> float:
        return median(sample[key] for sample in samples[name])

    copying = mid("nbdcopy", "seconds")
    everywhere, nowhere = mid("everywhere", "seconds"), mid("nowhere", "seconds")
    changed = mid("1 %", "changed")
    alone, beside = mid("client alone", "p99_us"), mid("client, resync", "p99_us")
    rows = [
        ("nbdcopy --flush, MiB/s", f"{size / MIB / copying:.0f}", ""),
        ("differs everywhere, MiB/s", f"{size / MIB / everywhere:.0f}", ""),
        ("... part of nbdcopy's", f"{copying / everywhere:.2f}", "0.7"),
        (
            "... with the image kept",
            f"{copying / mid('everywhere, image kept', 'seconds'):.2f}",
            "",
        ),
        ("the same, MiB/s", f"{size / MIB / nowhere:.0f}", ""),
        ("... times copying all of it", f"{everywhere / nowhere:.2f}", "3"),
        ("... times nbdcopy's", f"{copying / nowhere:.2f}", ""),
        ("... sent, part of the volume", f"{mid('nowhere', 'sent') / size:.5f}", "0.001"),
        ("1 % changed, seconds", f"{mid('1 %', 'seconds'):.2f}", ""),
        (
            "... sent less hashes, times the changed",
            f"{(mid('1 %', 'sent') - HASHES / 17 * size) / changed:.2f}",
            "1.3",
        ),
        ("client's p99 alone, us", f"{alone:.0f}", ""),
        ("... during a resync, times", f"{beside / alone:.2f}", "2"),
    ]
    lines = ["| | measured | bar |", "|---|---:|---:|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table, stores the samples."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.resync", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=1024, metavar="MIB")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each client run")
    parser.add_argument("--link", type=float, metavar="MIB", help="a second over the link")
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args(argv)
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir=options.directory))
    size = options.size * MIB
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        bench = Bench(directory, size, options.link and options.link * MIB)
        stack.enter_context(bench.cluster)
        samples = _measure(bench, options.rounds, options.seconds)
    table = _table(samples, size)
    print(table)
    machine = report.machine()
    print(f"\n{machine['cores']} cores {machine['processor']}, {options.size} MiB", file=sys.stderr)
    report.keep("resync", {"size": size, "link": options.link, "samples": samples})
    return 0


if __name__ == "__main__":
    sys.exit(main())
