"""A filesystem on two local facets and two remotes loses one of each, twice (M15, I2, I8)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.faults.inject import tmpfs
from tests.guest import guest
from tests.guest.kernel import TREE
from tests.integration.cluster import MIB, Cluster, Volume
from tests.integration.process import wait_until

SECONDS = 400.0
BACK_S = 90.0
VOLUME = Volume("data", size=160 * MIB, facets=2)
FULL_AT = 24 * MIB
"""Of the second facet's disk: less than the job writes."""


class Host:
    """What the job asks of the host."""

    def __init__(self, cluster: Cluster, disk: Path) -> None:
        self.cluster = cluster
        self.disk = disk
        self.node = cluster.primary
        self.first, self.second = map(str, self.node.facets(VOLUME.name))
        self.seen: list[str] = []

    def answer(self, words: list[str]) -> str | None:
        """One request of the job; what does not come true is the test's failure."""
        (word,) = words
        self.seen.append(word)
        actions = {
            "lose-first": self.lose_first,
            "mend": self.mend,
            "lose-second": self.lose_second,
            "in-sync": self.in_sync,
        }
        actions[word]()
        return None

    def _facet(self, path: str) -> str:
        return next(str(f["state"]) for f in self.node.rpc("facet.list") if f["path"] == path)

    def lose_first(self) -> None:
        """A remote is killed under load; the second facet's disk fills up meanwhile."""
        self.cluster.secondaries[0].kill()
        wait_until("the facet failed", lambda: self._facet(self.second) != "synchronised", BACK_S)
        assert any(one["kind"] == "facet-failed" for one in self.node.events())

    def mend(self) -> None:
        """The disk is larger, the remote starts again; both catch up under load."""
        subprocess.run(["mount", "-o", f"remount,size={VOLUME.size}", self.disk], check=True)
        self.cluster.secondaries[0].start()
        self.node.ok("facet", "online", self.second, "--wait", "--timeout", f"{BACK_S:g}")
        self.node.until("is back", lambda one: one["state"] == "synchronised", s=BACK_S)

    def lose_second(self) -> None:
        """The other of each: only what was lost before is left."""
        self.cluster.secondaries[1].kill()
        self.node.ok("facet", "offline", self.first)

    def in_sync(self) -> None:
        """Everything comes back, and all copies are the same."""
        self.cluster.secondaries[1].start()
        self.node.ok("facet", "online", self.first, "--wait", "--timeout", f"{BACK_S:g}")
        self.cluster.check_in_sync(BACK_S)


def test_any_facet_with_any_remote_fails_under_a_filesystem(tmp_path: Path) -> None:
    """M12, M15: fio with verify and an exerciser of files see neither an error nor wrong data.

    Runbook: a local facet and a remote fail at once."""
    with (
        tmpfs(tmp_path / "disk", FULL_AT) as disk,
        Cluster(
            tmp_path / "group", volumes=[VOLUME], remotes=("beta", "gamma"), tcp=True
        ) as cluster,
    ):
        facet = cluster.primary.facets(VOLUME.name)[1]
        facet.symlink_to(disk / "facet")
        (disk / "facet").touch()
        os.truncate(disk / "facet", VOLUME.size)
        cluster.start()
        host = Host(cluster, disk)
        variables = {
            "PORT": str(cluster.primary.nbd_port),
            "EXPORT": VOLUME.name,
            "TREE": str(TREE),
        }
        guest.run("pairs", SECONDS, environment=variables, answer=host.answer).check()
        assert host.seen == ["lose-first", "mend", "lose-second", "in-sync"]
        for node in cluster.nodes:
            node.stop()
        cluster.compare()
