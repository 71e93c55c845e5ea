"""A client among a thousand hostile connections: what its 4 KiB writes take, what memory goes.

``python -m tests.bench.hostile``: a primary with a connected remote; writes of one client, one at
a time, first alone and then beside a process that keeps ``--connections`` open at once (stalled in
the greeting or in an option, random bytes, options that are too many, too long or absurdly so) and
opens each anew, a second after it was sent away. The bar: the median latency at most
doubles, memory stays under ``limits.memory_bytes_max`` and the small buffers. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench import report
from tests.integration.cluster import MIB, Cluster
from tests.integration.tools import connect, pattern

LATENCY_BAR = 2.0
SMALL_BYTES = 64 * MIB
"""What strangers and ordinary buffers may cost beside the budget."""
REOPEN_S = 1.0

FLAGS = struct.pack(">I", 3)


def _attacks(rng: random.Random) -> list[bytes]:
    return [
        b"",
        FLAGS,
        FLAGS + b"IHAVE",
        FLAGS + struct.pack(">8sII", b"IHAVEOPT", 7, 60_000) + b"x" * 30_000,
        FLAGS + struct.pack(">8sII", b"IHAVEOPT", 99, 0xFFFFFFF0) + b"x" * 4096,
        FLAGS + struct.pack(">8sII", b"IHAVEOPT", 3, 0) * 200,
        rng.randbytes(4096),
        FLAGS + rng.randbytes(1 << 16),
    ]


async def _attack(path: str, data: bytes) -> None:
    """One hostile connection, again and again."""
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                writer.write(data)
                await writer.drain()
                while await reader.read(1 << 16):
                    pass
            finally:
                writer.close()
        await asyncio.sleep(REOPEN_S)


async def _attack_all(path: str, count: int) -> None:
    rng = random.Random(1)
    tasks = []
    for number in range(count):
        attacks = _attacks(rng)
        tasks.append(asyncio.ensure_future(_attack(path, attacks[number % len(attacks)])))
        if number % 50 == 0:
            await asyncio.sleep(0.01)
    print("ready", flush=True)
    await asyncio.gather(*tasks)


def _write(uri: str, seconds: float) -> dict[str, float]:
    """Latencies in microseconds of writes, one after the other."""
    handle = connect(uri)
    size, data = handle.get_size(), pattern(4096, 1)
    taken: list[float] = []
    end = time.perf_counter() + seconds
    number = 0
    while (began := time.perf_counter()) < end:
        handle.pwrite(data, number * 7919 * 4096 % size)
        taken.append((time.perf_counter() - began) * 1e6)
        number += 1
    quantiles = statistics.quantiles(taken, n=1000)
    return {
        "writes": len(taken),
        "mean_us": round(statistics.fmean(taken), 1),
        "p50_us": round(quantiles[499], 1),
        "p99_us": round(quantiles[989], 1),
        "p999_us": round(quantiles[998], 1),
    }


def _rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def measure(directory: Path, connections: int, seconds: float) -> dict[str, Any]:
    """One run; the nodes live below ``directory``."""
    with Cluster(directory / "group") as cluster:
        cluster.start()
        uri, pid = cluster.primary.uri(), cluster.primary.daemon.pid
        _write(uri, 1.0)
        alone = _write(uri, seconds)
        before = _rss(pid)
        argv = [sys.executable, "-m", "tests.bench.hostile", "--attack"]
        argv += [str(cluster.primary.nbd_socket), "--connections", str(connections)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as attacker:
            assert attacker.stdout is not None and attacker.stdout.readline() == "ready\n"
            try:
                beside = _write(uri, seconds)
                grown = _rss(pid) - before
                counts = cluster.primary.status()["connections"]
            finally:
                attacker.kill()
        cluster.check_in_sync()
        ratio = beside["p50_us"] / alone["p50_us"]
        bound = counts["memory"]["total"] + SMALL_BYTES
        return {
            "alone": alone,
            "beside": beside,
            "p50_ratio": round(ratio, 2),
            "mean_ratio": round(beside["mean_us"] / alone["mean_us"], 2),
            "memory_grown_bytes": grown,
            "memory_bound_bytes": bound,
            "connections": counts,
            "passed": ratio <= LATENCY_BAR and grown <= bound,
        }


def main() -> int:
    """Measures, keeps and prints; or, for itself, attacks."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.hostile", description=__doc__)
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement (5)")
    parser.add_argument("--directory", type=Path, help="where the files go (a temporary one)")
    parser.add_argument("--attack", metavar="SOCKET", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attack:
        asyncio.run(_attack_all(options.attack, options.connections))
        return 0
    with tempfile.TemporaryDirectory(prefix="nbdm-bench-", dir=options.directory) as directory:
        result = measure(Path(directory), options.connections, options.seconds)
    report.keep("hostile", result)
    print(json.dumps(result, indent=1))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
