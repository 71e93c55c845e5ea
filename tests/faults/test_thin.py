"""A thin disk that is full (faults 10, 13; O16, M8, M12, V9, I3): what is written is taken, and
lost when it is to be written out.

The sync that tells of it leaves the pages in the cache, marked clean, and ext4 counts their blocks
as allocated and not written yet. What is written over such pages reaches the disk, and its blocks
read as zeros all the same, once the cache is gone: the page cache has to be forgotten first.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import nbd
import pytest

from tests.faults.blocktrace import mounted
from tests.faults.inject import (
    needs_root,
    requires_programs,
    start_under,
    strace,
    tmpfs,
    wait_death,
)
from tests.integration.cluster import MIB, Cluster, Node, Volume
from tests.integration.process import wait_until
from tests.integration.tools import connect

pytestmark = [needs_root, requires_programs("losetup", "mkfs.ext4")]
MakeCluster = Callable[..., Cluster]
SIZE, WRITTEN, STEP = 16 * MIB, MIB, 64 << 10
POOL = 40 * MIB
"""What the thin disk, of more than it, may take; some of it the file system has."""
RETURN_S = 60.0


class Thin:
    """A file on ext4 on a disk that takes space as it is written to, from a pool that others use
    too."""

    def __init__(self, pool: Path, mountpoint: Path) -> None:
        self._filler = pool / "filler"
        self.file = mountpoint / "facet.img"
        with self.file.open("wb") as made:
            made.truncate(SIZE)

    def fill(self) -> None:
        """Nothing is left in the pool."""
        subprocess.run(["sync", "-f", str(self.file)], check=True)
        with self._filler.open("wb", buffering=0) as filler:
            try:
                while filler.write(bytes(STEP)):
                    pass
            except OSError:
                return

    def free(self) -> None:
        """There is space again."""
        self._filler.unlink()


@pytest.fixture
def thin(tmp_path: Path) -> Iterator[Thin]:
    """One with a file of the size of the volume, all of it a hole."""
    pool, mountpoint = tmp_path / "pool", tmp_path / "thin"
    mountpoint.mkdir()
    with tmpfs(pool, POOL):
        image = pool / "image"
        with image.open("wb") as made:
            made.truncate(4 * POOL)
        options = "lazy_journal_init=0,lazy_itable_init=0"
        subprocess.run(["mkfs.ext4", "-q", "-J", "size=4", "-E", options, str(image)], check=True)
        with mounted(image, mountpoint):
            yield Thin(pool, mountpoint)


def forget() -> None:
    """As a reboot leaves it: nothing is cached."""
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("1")


def write(node: Node, content: bytes) -> None:
    """Writes it at the front of the volume, and flushes that."""
    client = connect(node.uri())
    for at in range(0, len(content), STEP):
        client.pwrite(content[at : at + STEP], at)
    client.flush()


def lost(found: bytes, content: bytes) -> int:
    """How many blocks are not what was written."""
    return sum(
        found[at : at + 4096] != content[at : at + 4096] for at in range(0, len(content), 4096)
    )


def test_what_was_flushed_is_redone_onto_the_disk(make_cluster: MakeCluster, thin: Thin) -> None:
    """The only facet's sync fails and the node ends; started again, it redoes the log."""
    cluster = make_cluster(volumes=[Volume(size=SIZE)], remotes=(), log_size=4 * MIB)
    node, content = cluster.primary, random.Random(1).randbytes(WRITTEN)
    node.facets("data")[0].symlink_to(thin.file)
    cluster.create()
    node.start()
    thin.fill()
    write(node, content)
    wait_death(node)
    thin.free()
    node.start()
    node.stop()
    forget()
    assert lost(thin.file.read_bytes(), content) == 0


def test_a_facet_that_returns_has_it_on_its_disk(make_cluster: MakeCluster, thin: Thin) -> None:
    """Of two facets one's sync fails; it comes back by itself once there is space."""
    cluster = make_cluster(volumes=[Volume(size=SIZE, facets=2)], remotes=(), log_size=4 * MIB)
    node, content = cluster.primary, random.Random(2).randbytes(WRITTEN)
    node.facets("data")[0].symlink_to(thin.file)
    cluster.create()
    node.start()
    thin.fill()
    write(node, content)

    def state() -> str:
        found: str = node.status()["volumes"][0]["facets"][0]["state"]
        return found

    wait_until("the facet fails", lambda: state() != "synchronised", RETURN_S)
    thin.free()
    wait_until("the facet is back", lambda: state() == "synchronised", RETURN_S)
    node.stop()
    forget()
    assert lost(thin.file.read_bytes(), content) == 0


def test_a_secondary_has_it_on_its_disk(make_cluster: MakeCluster, thin: Thin) -> None:
    """A secondary's sync fails in a resync, and its node ends; started again, it is compared."""
    cluster = make_cluster(volumes=[Volume(size=SIZE, region_size=4096)], log_size=MIB)
    primary, secondary = cluster.primary, cluster.secondary
    content = random.Random(3).randbytes(8 * WRITTEN)
    secondary.facets("data")[0].symlink_to(thin.file)
    cluster.start()
    cluster.wait_in_sync()
    cluster.proxy.refuse()
    primary.until("away", lambda found: found["link"] == "disconnected")
    write(primary, content)
    thin.fill()
    cluster.proxy.heal()
    wait_death(secondary)
    thin.free()
    secondary.start()
    cluster.wait_in_sync()
    secondary.stop()
    forget()
    assert lost(thin.file.read_bytes(), content) == 0


@requires_programs("strace")
def test_a_snapshot_has_it_on_its_disk(make_cluster: MakeCluster, thin: Thin) -> None:
    """A layer's sync fails, and the process dies as it gives back what that had taken; started
    again, it keeps what is overwritten then."""
    cluster = make_cluster(volumes=[Volume(size=SIZE)], remotes=(), log_size=4 * MIB)
    node, layers = cluster.primary, thin.file.parent / "snapshots"
    node.write_config(f'[snapshots]\npath = "{layers}"\n')
    old, new = (random.Random(seed).randbytes(WRITTEN) for seed in (4, 5))
    cluster.create()
    node.start()
    write(node, old)
    node.rpc("snapshot.create")
    (layer,) = layers.rglob("*.data")
    node.stop()
    assert start_under(node, strace("fallocate", "signal=KILL", path=layer))
    thin.fill()
    with pytest.raises(nbd.Error):
        write(node, new)
    wait_death(node)
    thin.free()
    node.start()
    write(node, new)
    for _ in range(2):
        client = connect(node.uri("data@1"))
        assert lost(client.pread(WRITTEN, 0), old) == 0
        client.shutdown()
        node.stop()
        forget()
        node.start()
    node.stop()
