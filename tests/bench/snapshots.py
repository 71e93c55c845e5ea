"""What snapshots and restores cost: ``python -m tests.bench.snapshots``; prints one JSON object,
which is kept in ``tests/bench/results``.

- ``throughput``: random 4 KiB writes with 0, 1 and 16 snapshots, after a warm-up that has copied
  every region once, interleaved: as the client sees them, until the remote has them too, and what
  one costs both nodes of CPU. On two cores the client's rate says more of how much of the work
  waits for the load's end than of its cost; the bar, for the replicated ones: within 10 % of
  each other;
- ``cost``: what a write of 4 KiB, 16 of them at once, costs the engine alone of CPU, with as many;
- ``taking``: the longest of many writes while snapshots are taken, against the longest without, in
  turn, and against one sync of the same disk; the bar: at most one sync more;
- ``restore``: of a large, sparse volume of which some has changed: the time until it reads as the
  snapshot (the bar: 1 s), until it is copied and the remote in sync, what the status said of the
  progress, and the bytes that the remote was sent against those that had changed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbdmirror.codec.record import WRITE
from nbdmirror.config import AdminConfig, Config, LogConfig, NbdConfig, VolumeConfig
from nbdmirror.edge.env import real_env, run
from nbdmirror.engine.create import create
from nbdmirror.engine.node import Node
from nbdmirror.engine.volume import Change
from tests.bench.report import keep
from tests.integration.cluster import MIB, Cluster, Volume
from tests.integration.tools import Writer, connect, fio, pattern

GIB = 1024 * MIB
SYNC_S = 900.0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.snapshots", description=__doc__)
    parser.add_argument("--size", type=int, default=256, metavar="MIB", help="of the volume (256)")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each load (1.5)")
    parser.add_argument(
        "--large", type=int, default=1024, metavar="GIB", help="the restored volume (1024)"
    )
    parser.add_argument(
        "--changed", type=int, default=1024, metavar="MIB", help="of it, before the restore (1024)"
    )
    parser.add_argument("--rounds", type=int, default=11, help="of each load (11)")
    parser.add_argument("--only", choices=list(PARTS), action="append")
    parser.add_argument("--directory", type=Path, help="where the files go (a temporary one)")
    return parser.parse_args()


def _fill(cluster: Cluster, size: int, seed: int) -> None:
    handle = connect(cluster.primary.uri())
    for at in range(0, size, MIB):
        handle.pwrite(pattern(MIB, at + seed), at)
    handle.flush()
    handle.shutdown()


def _cpu_s(cluster: Cluster) -> float:
    """What the daemons have used so far."""
    ticks = 0
    for node in (cluster.primary, cluster.secondary):
        words = Path(f"/proc/{node.daemon.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(words[11]) + int(words[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _rate(cluster: Cluster, directory: Path, seconds: float) -> tuple[float, float, float]:
    """4 KiB random writes a second at depth 16, as the client sees it and until the remote has
    them too, and what one costs both nodes, in us of CPU."""
    load: dict[str, Any] = {
        "rw": "randwrite",
        "bs": "4k",
        "iodepth": 16,
        "time_based": 1,
        "runtime": seconds,
    }
    began = _cpu_s(cluster)
    result = fio(cluster.primary.uri(), directory, **load)["write"]
    ended = time.monotonic()
    cluster.wait_in_sync(SYNC_S)
    drain = time.monotonic() - ended
    sustained = result["total_ios"] / (result["runtime"] / 1000 + drain)
    cost = (_cpu_s(cluster) - began) / result["total_ios"] * 1e6
    return float(result["iops"]), sustained, cost


def throughput(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write rates by number of snapshots; each group lives on, loads are interleaved."""
    size = options.size * MIB
    rates: dict[int, list[float]] = {0: [], 1: [], 16: []}
    sustained: dict[int, list[float]] = {0: [], 1: [], 16: []}
    costs: dict[int, list[float]] = {0: [], 1: [], 16: []}
    clusters = {}
    for count in rates:
        cluster = Cluster(directory / f"s{count}", volumes=[Volume(size=size)], log_size=256 * MIB)
        cluster.start()
        clusters[count] = cluster
        _fill(cluster, size, 0)
        for _ in range(count):
            cluster.primary.ok("snapshot", "create")
        _fill(cluster, size, 1)  # every region is copied once
        cluster.wait_in_sync(SYNC_S)  # the secondary has copied every region too
    try:
        for _ in range(options.rounds):
            # Always in this order: what a load leaves to be written out meets another one's files.
            for count, cluster in clusters.items():
                rate, replicated, cost = _rate(cluster, directory, options.seconds)
                rates[count].append(rate)
                sustained[count].append(replicated)
                costs[count].append(cost)
    finally:
        for cluster in clusters.values():
            cluster.close()
    medians = {count: statistics.median(found) for count, found in rates.items()}
    # Of loads next to each other: what else the machine does meets all three.
    return {
        "writes_per_s": {k: [round(rate) for rate in found] for k, found in rates.items()},
        "medians": {k: round(v) for k, v in medians.items()},
        "ratio_to_none": _ratios(rates),
        "replicated_per_s": {k: round(statistics.median(v)) for k, v in sustained.items()},
        "replicated_ratio_to_none": _ratios(sustained),
        "cpu_us_per_write": {k: round(statistics.median(v), 1) for k, v in costs.items()},
        "cpu_ratio_to_none": _ratios(costs),
    }


def _ratios(found: dict[int, list[float]]) -> dict[int, float]:
    """Medians over the loads next to each other."""
    return {
        count: round(statistics.median(a / b for a, b in zip(some, found[0], strict=True)), 3)
        for count, some in found.items()
    }


def _sync_s(directory: Path) -> list[float]:
    """Syncs of a freshly written 64 KiB, each."""
    times = []
    with (directory / "sync").open("wb") as file:
        for number in range(500):
            os.pwrite(file.fileno(), pattern(65536, number), number * 65536)
            began = time.monotonic()
            os.fdatasync(file.fileno())
            times.append(time.monotonic() - began)
    return sorted(times)


def cost(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What a write costs the engine of CPU, with the snapshots that one primary gets meanwhile: no
    network, no client, and nobody else's work counts."""
    return run(_cost(directory / "c", options.rounds))


async def _cost(directory: Path, rounds: int) -> dict[str, Any]:
    size, batch = 64 * MIB, 16
    nodes: dict[int, Node] = {}
    for count in (0, 1, 16):
        path = directory / str(count)
        path.mkdir(parents=True)
        config = Config(
            path="",
            group="g",
            node="a",
            state_dir=str(path / "state"),
            nbd=NbdConfig(),
            admin=AdminConfig(socket=""),
            log=LogConfig(size=256 * MIB),
            volumes=(VolumeConfig("data", size, (str(path / "facet"),), 65536),),
        )
        await create(real_env(), config, "primary")
        node = nodes[count] = Node(real_env(), config)
        await node.start(nbd=False)
        for _ in range(count):
            await node.people.create(None, False)
        for at in range(0, size, 65536):  # every region is copied once
            await _write(node, [Change(WRITE, 0, at, 65536, pattern(65536, at))])
    data = pattern(4096, 1)
    places = [7919 * 4096 * number % size for number in range(20_000)]
    found: dict[int, list[float]] = {count: [] for count in nodes}
    for _ in range(rounds):
        for count, node in nodes.items():
            began = time.process_time()
            for at in range(0, len(places), batch):
                some = [Change(WRITE, 0, p, 4096, data) for p in places[at : at + batch]]
                await _write(node, some)
            found[count].append((time.process_time() - began) / len(places) * 1e6)
    for node in nodes.values():
        await node.stop()
    return {
        "cpu_us_per_write": {k: round(statistics.median(v), 2) for k, v in found.items()},
        "cpu_ratio_to_none": _ratios(found),
    }


async def _write(node: Node, changes: list[Change]) -> None:
    assert node.primary is not None
    rest = node.primary.group.write(node.volumes[0], changes)
    if rest is not None:
        await rest


def taking(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The longest write with and without a snapshot being taken, in turn, under load."""
    size = options.size * MIB
    slowest: dict[str, list[float]] = {"without": [], "taking": []}
    with Cluster(directory / "t", volumes=[Volume(size=size)], log_size=256 * MIB) as cluster:
        cluster.start()
        _fill(cluster, size, 0)
        cluster.wait_in_sync(SYNC_S)
        with Writer(cluster.primary.uri(), seed=9, blocks=size // 4096):  # the load beside
            for _ in range(options.rounds):
                for name, found in slowest.items():
                    with Writer(cluster.primary.uri()) as writer:
                        time.sleep(options.seconds / 4)  # writes before it, and after: the load
                        if name == "taking":
                            # Not by the command, whose start takes a processor for as long.
                            cluster.primary.rpc("snapshot.create")
                        time.sleep(options.seconds / 4)
                    found.append(writer.slowest_s)
            syncs = _sync_s(directory)  # beside the load, as those of the daemons are
    return {
        "longest_write_s": {k: [round(one, 4) for one in v] for k, v in slowest.items()},
        "medians_s": {k: round(statistics.median(v), 4) for k, v in slowest.items()},
        "added_s": round(
            statistics.median(slowest["taking"]) - statistics.median(slowest["without"]), 4
        ),
        "sync_s": {"median": round(syncs[len(syncs) // 2], 4), "longest": round(syncs[-1], 4)},
    }


def restore(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A large volume, a little of it changed."""
    size, changed = options.large * GIB, options.changed * MIB
    with Cluster(directory / "r", volumes=[Volume(size=size)], log_size=GIB) as cluster:
        cluster.start()
        _fill(cluster, changed, 0)
        cluster.wait_in_sync(SYNC_S)
        cluster.primary.ok("snapshot", "create")
        _fill(cluster, changed, 7)
        cluster.wait_in_sync(SYNC_S)
        handle = connect(cluster.primary.uri())
        sent = cluster.primary.remote()["bytes_sent"]
        began = time.monotonic()
        cluster.primary.rpc("restore", snapshot="1", while_attached=True)
        first = bytes(handle.pread(4096, changed - MIB))
        usable = time.monotonic() - began
        assert first == pattern(MIB, changed - MIB)[:4096], "it does not read as the snapshot"
        progress = _watch(cluster)
        copied = time.monotonic() - began
        cluster.wait_in_sync(SYNC_S)
        in_sync = time.monotonic() - began
        sent = cluster.primary.remote()["bytes_sent"] - sent
        _compare(cluster, changed)
    return {
        "volume_bytes": size,
        "changed_bytes": changed,
        "usable_s": round(usable, 3),
        "copied_s": round(copied, 1),
        "in_sync_s": round(in_sync, 1),
        "sent_bytes": sent,
        "sent_to_changed": round(sent / changed, 3),
        "progress": progress,
    }


def _watch(cluster: Cluster) -> list[float]:
    """The shares done that the status told while the copy ran; they must not fall."""
    seen: list[float] = []
    while (state := cluster.primary.status()["restore"]) is not None:
        seen.append(round(state["done_bytes"] / state["total_bytes"], 3))
        time.sleep(0.5)  # between two looks: they cost the processor too
    assert seen == sorted(seen), f"the progress fell: {seen}"
    return seen


def _compare(cluster: Cluster, length: int) -> None:
    """What was written is the same on both nodes, and what the snapshot had."""
    files = [node.facets("data")[0].open("rb") for node in (cluster.primary, cluster.secondary)]
    for at in range(0, length, MIB):
        for file in files:
            assert file.read(MIB) == pattern(MIB, at), f"{file.name} differs at {at}"
    for file in files:
        file.close()


PARTS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "restore": restore,
    "taking": taking,
    "throughput": throughput,
    "cost": cost,
}


def main() -> None:
    """Runs what is wanted, and keeps the figures."""
    options = _options()
    command = " ".join(["python -m tests.bench.snapshots", *sys.argv[1:]])
    result: dict[str, Any] = {"command": command}
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        for part in options.only or PARTS:
            result[part] = PARTS[part](Path(name), options)
    keep("snapshots", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
