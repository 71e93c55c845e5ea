"""A filesystem damaged by hand is restored while it is attached and its snapshot is mounted
elsewhere, and the secondary follows (rows V9, V11, V12)."""

from __future__ import annotations

from pathlib import Path

from tests.guest import guest
from tests.guest.guest import Disk
from tests.integration.cluster import MIB, Cluster, Volume
from tests.integration.process import wait_until

SECONDS = 400.0
COPY_S = 60.0
VOLUME = Volume("data", size=64 * MIB)


class Host:
    """What the job asks of the host."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.seen: list[str] = []

    def answer(self, words: list[str]) -> str | None:
        """One request of the job; what does not come true is the test's failure."""
        (word,) = words
        self.seen.append(word)
        actions = {
            "snapshot": self.snapshot,
            "restore": self.restore,
            "copied": self.copied,
            "in-sync": self.cluster.check_in_sync,
        }
        actions[word]()
        return None

    def snapshot(self) -> None:
        """One that may be written into, on both nodes."""
        self.cluster.primary.ok("snapshot", "create")
        self.cluster.primary.ok("snapshot", "export", "1", "--writable")
        wait_until(
            "the secondary has it",
            lambda: self.cluster.secondary.status()["snapshots"] or None,
            COPY_S,
        )

    def restore(self) -> None:
        """The volume is attached: that has to be said."""
        primary = self.cluster.primary
        refused = primary.cli("restore", "1")
        assert refused.code == 4 and "--while-attached" in str(refused)
        primary.ok("restore", "1", "--while-attached")

    def copied(self) -> None:
        """Nothing is left of the copy behind."""
        wait_until(
            "it is copied",
            lambda: self.cluster.primary.status()["restore"] is None or None,
            COPY_S,
        )


def test_a_damaged_filesystem_is_restored(tmp_path: Path) -> None:
    """mkfs, files, snapshot, damage, restore; then the secondary has it all."""
    with Cluster(tmp_path / "group", volumes=[VOLUME], tcp=True) as cluster:
        cluster.start()
        host = Host(cluster)
        variables = {
            "PORT": str(cluster.primary.nbd_port),
            "PORT2": str(cluster.secondary.nbd_port),
        }
        guest.run(
            "restore",
            SECONDS,
            disks=[Disk(cluster.secondary.facets(VOLUME.name)[0], read_only=True)],
            environment=variables,
            answer=host.answer,
        ).check()
        assert host.seen == ["snapshot", "restore", "copied", "in-sync"]
        cluster.primary.stop()
        cluster.secondary.stop()
        cluster.compare()
