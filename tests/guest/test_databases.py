"""Databases on a filesystem on a mirrored volume lose the link, and then the primary (V3, I3, I8).

PostgreSQL with pgbench is for ``make guest``, where it is installed: it takes minutes, and 170 MB
with a server that starts by itself are more than these tests ask of a machine.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.guest import guest
from tests.guest.guest import Disk
from tests.guest.kernel import TREE
from tests.integration.cluster import MIB, Cluster, Volume
from tests.integration.process import wait_until

PGBENCH = "/usr/lib/postgresql/15/bin/pgbench"
SECONDS = 600.0
STEP_S = 90.0
SIZES = {"sqlite": 32 * MIB, "postgresql": 160 * MIB}
TUNING = {"heartbeat_seconds": 1.0, "timeout_seconds": 8.0, "reconnect_max_seconds": 0.5}
"""A loaded machine is not to take a slow answer for a lost link: replies wait for it."""
BLOCK = 1 << 20


class Host:
    """What the job asks of the host."""

    def __init__(self, cluster: Cluster, copy: Path) -> None:
        self.cluster = cluster
        self.copy = copy
        self.seen: list[str] = []

    def answer(self, words: list[str]) -> str | None:
        """One request of the job; what does not come true is the test's failure."""
        (word,) = words
        self.seen.append(word)
        actions = {"cut": self.cut, "heal": self.heal, "failover": self.failover}
        actions[word]()
        return None

    def cut(self) -> None:
        """No link; the clients go on without (``on_link_loss``)."""
        self.cluster.proxy.refuse()
        self.cluster.primary.until("is out of step", lambda one: one["in_step"] is False)

    def heal(self) -> None:
        """The remote catches up under load, and replies wait for it again."""
        self.cluster.proxy.heal()
        node = self.cluster.primary
        node.until("is in step", lambda one: one["in_step"] is True, s=STEP_S)

    def failover(self) -> None:
        """The primary dies while transactions are under way; the copy is what the secondary has."""
        node, other = self.cluster.primary, self.cluster.secondary
        # What was committed out of step is there too, once it is in step again.
        node.until("is in step", lambda one: one["in_step"] is True, s=STEP_S)
        node.kill()

        def applied() -> bool:
            upstream = other.rpc("status")["upstream"]
            return bool(
                upstream["link"] == "disconnected"
                and upstream["applied_seq"] == upstream["received_seq"] == upstream["durable_seq"]
            )

        wait_until("all is applied", applied, STEP_S)
        assert other.rpc("status")["upstream"]["consistent"]
        (facet,) = other.facets("data")
        with facet.open("rb") as source, self.copy.open("r+b") as target:
            while data := source.read(BLOCK):
                target.write(data)


@pytest.mark.parametrize(
    "database",
    [
        "sqlite",
        pytest.param(
            "postgresql",
            marks=pytest.mark.skipif(
                "POSTGRESQL" not in os.environ or not os.access(PGBENCH, os.X_OK),
                reason="takes minutes: POSTGRESQL=1, with postgresql-15 installed",
            ),
        ),
    ],
)
def test_a_database_fails_over(database: str, tmp_path: Path) -> None:
    """V3, I3: commits go on over an outage; after the loss of the primary the secondary's copy has
    every transaction that was committed, and passes the database's own check of its integrity."""
    volume = Volume("data", size=SIZES[database])
    copy = tmp_path / "copy"
    with copy.open("wb") as file:
        file.truncate(volume.size)
    with Cluster(
        tmp_path / "group",
        volumes=[volume],
        tcp=True,
        remote_keys={"mode": "sync", "on_link_loss": "continue"},
        tuning=TUNING,
    ) as cluster:
        cluster.start()
        host = Host(cluster, copy)
        variables = {
            "DATABASE": database,
            "PORT": str(cluster.primary.nbd_port),
            "EXPORT": volume.name,
            "TREE": str(TREE),
        }
        outcome = guest.run(
            "databases", SECONDS, disks=[Disk(copy)], environment=variables, answer=host.answer
        ).check()
        assert host.seen == ["cut", "heal", "failover"]
        print(outcome.serial[-600:])
