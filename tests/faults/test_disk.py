"""Disks that fail, lie, fill up and stall (faults 8-11, 13, 14, 17; M12, M13, O16, O18).

After a sync of the log or a facet failed, no success is replied any more, not even if the next
sync says "ok"; the daemon ends with exit code 1 and says which file and what to do; started
again, it is as after any death: nothing is lost that is still in the page cache or on the disk.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.inject import (
    ALL_POINTS,
    StorageDaemon,
    bury,
    check_equal,
    check_message,
    check_serves,
    needs_root,
    requires_programs,
    run_until_broken,
    start_under,
    strace,
    tmpfs,
    wait_death,
)
from tests.faults.journal import Background, Journal, Load
from tests.integration.cluster import MIB, Cluster, Node, Volume
from tests.integration.process import wait_until
from tests.integration.test_replication import STALL_S

MakeCluster = Callable[..., Cluster]
SIZE = 8 * MIB
EIO, ENOSPC = 5, 28


def small_group(make_cluster: MakeCluster, **options: object) -> Cluster:
    """A primary and a secondary of one small volume."""
    options.setdefault("log_size", 16 * MIB)
    return make_cluster(volumes=[Volume(size=SIZE)], **options)


def files(node: Node) -> dict[str, Path]:
    """The files of a node, by what they are."""
    state = node.directory / "state"
    return {
        "log": state / "log",
        "superblock": state / "superblock",
        "active": state / "active",
        "facet": node.facets("data")[0],
    }


@requires_programs("strace")
@pytest.mark.parametrize("what", ["log", "superblock", "active", "facet"])
@pytest.mark.parametrize("when", ["1", "2+"])
def test_failed_sync_of_the_primary(make_cluster: MakeCluster, what: str, when: str) -> None:
    """Faults 8 and 9: the Nth fdatasync of a file fails with EIO, once or for ever: no FLUSH or
    FUA that needs it succeeds, nor anything after it; exit 1, a message that names the file."""
    cluster = small_group(make_cluster).start()
    journal = Journal(SIZE)
    node = cluster.primary
    node.stop()
    path = files(node)[what]
    if start_under(node, strace("fdatasync", "error=EIO", when, path=path), code=1):
        with Load(node.nbd_socket, journal, flush_every=2) as load:
            run_until_broken(load, 40)
            wait_until("the daemon ends", lambda: not node.alive or run_until_broken(load, 10))
        assert load.successes_after_failure == 0
        assert wait_death(node) == 1, node.daemon.output()
        check_message(node, str(path), "failed" if what in ("log", "facet") else "cannot")
    node.start()
    check_serves(cluster, journal)
    check_equal(cluster)
    node.kill()
    node.start()
    check_serves(cluster, journal)


@requires_programs("strace")
@pytest.mark.parametrize("what", ["log", "superblock", "facet"])
def test_failed_sync_of_the_secondary(make_cluster: MakeCluster, what: str) -> None:
    """Faults 8 and 9: what it could not make durable it never confirms (O4); exit 1; the client
    of the primary notices nothing; started again, it goes on."""
    cluster = small_group(make_cluster).start()
    journal = Journal(SIZE)
    node = cluster.secondary
    node.stop()
    path = files(node)[what]
    ready = start_under(node, strace("fdatasync", "error=EIO", "2", path=path), code=1)
    with Load(cluster.primary.nbd_socket, journal) as load, Background(load):
        if ready:
            assert wait_death(node) == 1
            check_message(node, str(path))
        confirmed = cluster.primary.remote()["durable_seq"]
        node.start()
        assert node.status()["upstream"]["durable_seq"] >= confirmed
    assert not load.failures
    check_equal(cluster)
    check_serves(cluster, journal)


@needs_root
@requires_programs("qemu-storage-daemon")
@pytest.mark.parametrize("what", ["log", "facet"])
@pytest.mark.parametrize("side", ["primary", "secondary"])
def test_second_sync_is_not_believed(make_cluster: MakeCluster, what: str, side: str) -> None:
    """Fault 9: a disk whose flush fails once and then says "ok" again: the first counts."""
    cluster = small_group(make_cluster)
    node: Node = getattr(cluster, side)
    cluster.create()
    path = files(node)[what]
    image = path.with_suffix(".disk")
    path.rename(image)
    fault = (
        '{"driver":"blkdebug","node-name":"top","image":"image",'
        '"inject-error":[{"event":"none","iotype":"flush","errno":5,"once":true}]}'
    )
    journal = Journal(SIZE)
    with StorageDaemon(path, image, [fault]):
        for one in cluster.nodes:
            one.start()
        with Load(cluster.primary.nbd_socket, journal, flush_every=2) as load:
            while node.alive and not run_until_broken(load, 1):
                pass
            assert load.successes_after_failure == 0
        assert wait_death(node) == 1
        check_message(node, str(path))
        node.start()
        check_serves(cluster, journal)
        check_equal(cluster)
        for one in reversed(cluster.nodes):
            one.stop()


@requires_programs("strace")
@pytest.mark.parametrize("action", ["error=EIO", "error=ENOSPC", "retval=512"])
@pytest.mark.parametrize("what", ["log", "facet"])
def test_failed_write_of_the_primary(make_cluster: MakeCluster, what: str, action: str) -> None:
    """Faults 10 and 11: a write fails, or takes 512 bytes of what it was given. A short write is
    finished; else the client gets an error, never a success that is not true."""
    cluster = small_group(make_cluster).start()
    journal = Journal(SIZE)
    node = cluster.primary
    node.stop()
    calls = "pwritev2" if what == "log" else "pwrite64"
    # A short count that is claimed, but not written, is a lie: only the second half of a write
    # that was split can be cut. strace writes nothing at all, so the log is never told 512.
    assert start_under(node, strace(calls, action, 30, path=files(node)[what]))
    with Load(node.nbd_socket, journal) as load:
        broken = run_until_broken(load, 60)
    if action == "retval=512":
        bury(node)
    else:
        assert broken or load.failures, "the fault did not happen"
        assert load.successes_after_failure == 0
        assert wait_death(node) == 1, node.daemon.output()
        check_message(node, str(files(node)[what]))
    node.start()
    check_serves(cluster, journal)
    check_equal(cluster)
