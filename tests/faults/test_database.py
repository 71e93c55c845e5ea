"""A database that spans two volumes recovers from the secondary, wherever it was cut (V4, V7).

``DATABASE_CUTS=50`` for a campaign.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults import bank
from tests.faults.inject import requires_programs, unmount
from tests.faults.test_disk import MakeCluster
from tests.integration.cluster import MIB, Cluster, Volume
from tests.integration.process import Process, wait_until

CUTS = int(os.environ.get("DATABASE_CUTS", "6"))
SIZE = 8 * MIB
RECORDS_BETWEEN_MAX = 1500
"""About four transfers."""


def _mounted(file: Path) -> bool:
    return file.stat().st_size == SIZE


def _beyond(seq: int, remote: dict[str, Any]) -> bool:
    return int(remote["durable_seq"]) > seq


@contextmanager
def mounted(cluster: Cluster, directory: Path) -> Iterator[Path]:
    """The database's file, and beside it its journal: each a volume, through nbdfuse."""
    path = directory / "bank"
    files = {"data": path, "journal": Path(f"{path}{bank.JOURNAL}")}
    processes = []
    try:
        for volume, file in files.items():
            file.touch()
            argv = ["nbdfuse", str(file), cluster.primary.uri(volume)]
            processes.append(Process("nbdfuse", argv, directory / f"{volume}.log"))
            wait_until("nbdfuse is there", partial(_mounted, file))
        yield path
    finally:
        for process, file in zip(processes, files.values(), strict=False):
            unmount(file)
            process.stop()


def image(cluster: Cluster, directory: Path, number: int) -> None:
    """Keeps what the secondary's facets hold now."""
    for volume in ("data", "journal"):
        facet = cluster.secondary.facets(volume)[0]
        subprocess.run(
            ["cp", "--sparse=always", facet, directory / f"{volume}{number}"], check=True
        )


def recovered(directory: Path, data: int, journal: int) -> int:
    """The transfers that the data of one image and the journal of one make together."""
    path = directory / "tried"
    shutil.copyfile(directory / f"data{data}", path)
    shutil.copyfile(directory / f"journal{journal}", f"{path}{bank.JOURNAL}")
    return bank.check(path)


def fits(directory: Path, data: int, journal: int) -> bool:
    """Whether they make any."""
    try:
        recovered(directory, data, journal)
    except (AssertionError, sqlite3.Error):
        return False
    return True


def cut(cluster: Cluster, *, power: bool) -> None:
    """The link is cut; ``power``: the secondary is killed too, and starts alone. Returns when all
    that the secondary has is in its facets."""
    node = cluster.secondary
    if power:
        node.kill()
        cluster.proxy.refuse()
        node.start()
    else:
        cluster.proxy.refuse()

    def applied() -> bool:
        upstream = node.rpc("status")["upstream"]
        return bool(
            upstream["link"] == "disconnected"
            and upstream["applied_seq"] == upstream["received_seq"] == upstream["durable_seq"]
        )

    wait_until("all is applied", applied)
    assert node.rpc("status")["upstream"]["consistent"]


@requires_programs("nbdfuse")
def test_a_database_on_two_volumes_recovers_from_the_secondary(
    make_cluster: MakeCluster, tmp_path: Path
) -> None:
    """V4, V7, issue C's bar: SQLite writes all the time, data and journal on two volumes of the
    group; the link is cut at random points, every other time with a kill of the secondary; each
    time both facets of the secondary recover together to what some number of transfers makes, and
    never to fewer than the time before. Facets of two different points do not."""
    chance = random.Random(7)
    cluster = make_cluster(volumes=[Volume("data", size=SIZE), Volume("journal", size=SIZE)])
    bank.create(tmp_path / "new")
    for node in cluster.nodes:
        content = (tmp_path / "new").read_bytes()
        assert len(content) < SIZE
        node.facets("data")[0].write_bytes(content.ljust(SIZE, b"\0"))
    cluster.start()
    node = cluster.primary
    counts = [0]
    with mounted(cluster, tmp_path) as path:
        argv = [sys.executable, "-m", "tests.faults.bank", "work", str(path)]
        load = Process("bank", argv, tmp_path / "bank.log")
        try:
            for number in range(CUTS):
                more = node.remote()["durable_seq"] + chance.randrange(RECORDS_BETWEEN_MAX)
                node.until("has more", partial(_beyond, more))
                cut(cluster, power=bool(number % 2))
                image(cluster, tmp_path, number)
                counts.append(recovered(tmp_path, number, number))
                assert counts[-1] >= counts[-2], counts
                assert load.alive, load.failure("the client saw an error")
                cluster.proxy.heal()
                node.until("is in sync", lambda one: one["state"] == "synchronised")
        finally:
            load.kill()
    assert counts[-1] > counts[0], "no transfer ever arrived"
    cluster.check_in_sync()
    image(cluster, tmp_path, CUTS)
    assert recovered(tmp_path, CUTS, CUTS) >= counts[-1]
    if CUTS >= 30:  # by then some cut was amid the writes of a transfer
        assert any(not fits(tmp_path, number, number + 1) for number in range(CUTS))
