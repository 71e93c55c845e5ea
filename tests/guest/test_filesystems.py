"""The main job with a real kernel: filesystems on a mirrored volume, an outage, an overflow, a
resync with writes running, and then the same bits and the same files on the secondary (rows V6,
M7, M10; invariants I2, I8)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.guest import guest
from tests.guest.guest import Disk
from tests.integration.cluster import MIB, Cluster, Volume

SECONDS = 600.0
RESYNC_S = 120.0
# The size that mkfs.xfs insists on is 300 MiB; the log is far smaller than what the job writes.
VOLUME = Volume("data", size=320 * MIB)
LOG_SIZE = 8 * MIB


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
            "cut": self.cluster.proxy.refuse,
            "heal": self.cluster.proxy.heal,
            "tracking": self.tracking,
            "in-sync": self.in_sync,
        }
        actions[word]()
        return None

    def tracking(self) -> None:
        """The log has overflowed: the remote is in DCM logging, with marked regions."""
        self.cluster.primary.until(
            "is tracked in its DCM",
            lambda remote: remote["state"] == "tracking" and remote["dirty"]["regions"] > 0,
        )

    def in_sync(self) -> None:
        """In sync without a person, and equal bit for bit."""
        self.cluster.check_in_sync(RESYNC_S)


@pytest.mark.parametrize("filesystem", ["ext4", "xfs", "btrfs"])
def test_filesystem(filesystem: str, tmp_path: Path) -> None:
    """mkfs, files, fio, sqlite, cut, overflow, heal, fsck; then the secondary has it all."""
    with Cluster(tmp_path / "group", volumes=[VOLUME], log_size=LOG_SIZE, tcp=True) as cluster:
        cluster.start()
        host = Host(cluster)
        facet = cluster.secondary.facets(VOLUME.name)[0]
        variables = {
            "FS": filesystem,
            "PORT": str(cluster.primary.nbd_port),
            "EXPORT": VOLUME.name,
        }
        guest.run(
            "filesystems",
            SECONDS,
            disks=[Disk(facet, read_only=True)],
            environment=variables,
            answer=host.answer,
        ).check()
        assert host.seen == ["cut", "tracking", "heal", "in-sync"]
        cluster.primary.stop()
        cluster.secondary.stop()
        cluster.compare()
    # Three groups of this size would stay in the directory of the test run.
    shutil.rmtree(tmp_path / "group")
