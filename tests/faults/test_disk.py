"""Disks that fail, lie, fill up and stall (faults 8-11, 13, 14, 17; M12, M13, O16, O18).

After a sync of what nobody else holds failed, no success is replied any more, not even if the
next sync says "ok"; the daemon ends with exit code 1 and says which file and what to do; started
again, it is as after any death: nothing is lost that the log has, or the disk. Where somebody else
holds it the node goes on: ``test_facets``, ``test_no_facet`` and ``test_log_loss``; what ext4 makes
of what is written again: ``test_thin``.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.blocktrace import detach
from tests.faults.inject import (
    StorageDaemon,
    bury,
    check_equal,
    check_message,
    check_serves,
    needs_root,
    requires_programs,
    run_until_broken,
    serve_fails,
    start_under,
    strace,
    tmpfs,
    wait_death,
)
from tests.faults.journal import NEVER, Background, Journal, Load
from tests.integration.cluster import MIB, Cluster, Node, Volume
from tests.integration.process import wait_until
from tests.integration.test_replication import STALL_S
from tests.integration.tools import connect, pattern

MakeCluster = Callable[..., Cluster]
SIZE = 8 * MIB
EIO, ENOSPC = 5, 28


def small_group(make_cluster: MakeCluster, **options: object) -> Cluster:
    """A primary and a secondary of one small volume."""
    options.setdefault("log_size", 16 * MIB)
    return make_cluster(volumes=[Volume(size=SIZE)], **options)


def alone(wanted: bool) -> dict[str, object]:
    """A group without remotes, where nobody stands in for the last facet (M11)."""
    return {"remotes": ()} if wanted else {}


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
@pytest.mark.parametrize(
    ("what", "when"),
    [
        ("superblock", "1"),
        ("active", "1"),
        ("active", "2+"),
        ("facet", "1"),
    ],
)
def test_failed_sync_of_the_primary(make_cluster: MakeCluster, what: str, when: str) -> None:
    """Faults 8 and 9: the Nth fdatasync of a file fails with EIO, once or for ever: no FLUSH or
    FUA that needs it succeeds, nor anything after it; exit 1, a message that names the file."""
    cluster = small_group(make_cluster, **alone(what == "facet"))
    # More extents than can be hot: the active map is synced again and again.
    cluster.primary.keys["log"] = ['extent_size = "64KiB"', "hot_extents = 64"]
    cluster.primary.write_config()
    cluster.start()
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
        # Alone: a primary whose log has overflowed meanwhile would have it begin anew.
        cluster.proxy.refuse()
        node.start()
        assert node.status()["upstream"]["durable_seq"] >= confirmed
        cluster.proxy.heal()
    assert not load.failures
    check_equal(cluster)
    check_serves(cluster, journal)


@needs_root
@requires_programs("qemu-storage-daemon")
@pytest.mark.parametrize(
    ("side", "what"), [("primary", "facet"), ("secondary", "log"), ("secondary", "facet")]
)
def test_second_sync_is_not_believed(make_cluster: MakeCluster, what: str, side: str) -> None:
    """Fault 9: a disk whose flush fails once and then says "ok" again: the first counts."""
    cluster = small_group(make_cluster, **alone(what == "facet" and side == "primary"))
    node: Node = getattr(cluster, side)
    cluster.create()
    path = files(node)[what]
    image = path.with_suffix(".disk")
    path.rename(image)
    fault = (
        '{"driver":"blkdebug","node-name":"top","image":"image","discard":"unmap",'
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
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_failed_write_of_the_primary(make_cluster: MakeCluster, error: str) -> None:
    """Faults 10 and 11: the 30th write to the only facet fails: the client gets an error, and from
    then on never a success; exit 1; what was acknowledged before is there after another start.

    Runbook: the last facet is lost, no remote follows."""
    cluster = small_group(make_cluster, remotes=()).start()
    journal = Journal(SIZE)
    node = cluster.primary
    node.stop()
    path = files(node)["facet"]
    assert start_under(node, strace("pwrite64", f"error={error}", 30, path=path))
    with Load(node.nbd_socket, journal) as load:
        assert run_until_broken(load, 60) or load.failures, "the fault did not happen"
        assert load.successes_after_failure == 0
    assert wait_death(node) == 1, node.daemon.output()
    check_message(node, str(path), "write", "failed")
    node.start()
    check_serves(cluster, journal)
    check_equal(cluster)


@requires_programs("strace")
def test_short_write_is_finished(make_cluster: MakeCluster) -> None:
    """Fault 10: the kernel takes 512 bytes of a write to the facet: the rest follows. (The 512
    are claimed, not written: they, and nothing else, stay as they were.)"""
    cluster = small_group(make_cluster).start()
    node = cluster.primary
    node.stop()
    path = files(node)["facet"]
    assert start_under(node, strace("pwrite64", "retval=512", 3, path=path))
    handle = connect(node.uri())
    data = [pattern(4096, number) for number in range(5)]
    for number, block in enumerate(data):
        handle.pwrite(block, number * 4096)
    expected = [*data[:2], bytes(512) + data[2][512:], *data[3:]]
    assert path.read_bytes()[: 5 * 4096] == b"".join(expected)
    bury(node)
    node.start()  # redo writes it again
    assert path.read_bytes()[: 5 * 4096] == b"".join(data)
    check_equal(cluster)


@needs_root
@pytest.mark.parametrize("side", ["primary", "secondary"])
def test_facet_disk_runs_full(make_cluster: MakeCluster, side: str) -> None:
    """Faults 10 and 11: a sparse facet on a file system that fills up, with a real short write at
    its end: a client's error, or a secondary that ends; then space is made, and all goes on."""
    cluster = small_group(make_cluster, **alone(side == "primary"))
    node: Node = getattr(cluster, side)
    journal = Journal(SIZE)
    with tmpfs(node.directory / "disk", 4 * MIB + 12 * 1024) as disk:
        text = node.config.read_text()
        node.config.write_text(text.replace(f"{node.directory}/data.0", f"{disk}/data.0"))
        move_facet(node, disk)
        cluster.start()
        with Load(cluster.primary.nbd_socket, journal) as load:
            wait_until("the disk is full", lambda: run_until_broken(load, 5) or not node.alive)
            assert load.successes_after_failure == 0
            assert bool(load.failures) == (side == "primary")
        assert wait_death(node) == 1, node.daemon.output()
        check_message(node, f"{disk}/data.0.img", "No space left")
        grow(disk, 16 * MIB)
        node.start()
        check_serves(cluster, journal)
        check_equal(cluster)
        for one in reversed(cluster.nodes):
            one.stop()


@needs_root
@requires_programs("losetup")
@pytest.mark.parametrize("side", ["primary", "secondary"])
def test_thin_disk_runs_full(make_cluster: MakeCluster, side: str) -> None:
    """Fault 13, O16: a facet on a disk that has promised more than it has: every write goes well,
    the sync fails, and the next would say "ok" with the data gone. The first counts, as fault 8;
    with more space, and without what was in the page cache, the log writes it anew."""
    cluster = small_group(make_cluster, **alone(side == "primary"))
    node: Node = getattr(cluster, side)
    journal = Journal(SIZE)
    with tmpfs(node.directory / "pool", 3 * MIB) as pool:
        image = pool / "image"
        image.touch()
        os.truncate(image, SIZE)
        with looped(image) as device:
            text = node.config.read_text()
            node.config.write_text(text.replace(f"{node.directory}/data.0.img", device))
            node.facets = lambda volume: [Path(device)]  # type: ignore[method-assign]
            cluster.start()
            with Load(cluster.primary.nbd_socket, journal, flush_every=3) as load:
                wait_until("it is full", lambda: run_until_broken(load, 5) or not node.alive, 90)
                assert load.successes_after_failure == 0
            assert wait_death(node) == 1, node.daemon.output()
            check_message(node, f"sync of facet {device} failed")
        grow(pool, 5 * SIZE)
        with looped(image, device):
            node.start()
            check_serves(cluster, journal)
            check_equal(cluster)
            for one in reversed(cluster.nodes):
                one.stop()


@contextlib.contextmanager
def looped(image: Path, device: str = "-f") -> Iterator[str]:
    """A loop device over an image: that one, or any."""
    show = ["--show"] if device == "-f" else []
    argv = ["losetup", *show, device, str(image)]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    device = done.stdout.strip() or device
    try:
        yield device
    finally:
        detach(device)


def move_facet(node: Node, directory: Path) -> None:
    """The test's idea of where the node's facet lies follows its configuration."""

    def facets(volume: str) -> list[Path]:
        return [directory / f"{volume}.0.img"]

    node.facets = facets  # type: ignore[method-assign]


@needs_root
def test_state_does_not_fit(make_cluster: MakeCluster) -> None:
    """Fault 12, O18: superblock, active map and log are preallocated: too small a disk is found
    when the node is created, not later; the message says so; with space, create succeeds."""
    cluster = small_group(make_cluster, log_size=4 * MIB)
    node = cluster.primary
    with tmpfs(node.directory / "state", 256 * 1024) as disk:
        for size in (256 * 1024, 600 * 1024, 4 * MIB):
            grow(disk, size)
            result = node.create("--force")
            assert result.code == 1, result
            assert "No space left" in result.err and "Traceback" not in result.err, result
        assert "not finished" in serve_fails(node)
        grow(disk, 16 * MIB)
        assert node.create("--force").code == 0
        node.start()
        node.stop()


@needs_root
@pytest.mark.parametrize("whose", ["remote", "facet"])
def test_state_disk_runs_full(make_cluster: MakeCluster, whose: str) -> None:
    """Faults 11 and 12: the disk of state_dir fills up while the node runs: all that is written
    there was allocated before, except the pages of DCMs: the first change that a remote, or a
    facet that is out, lacks and the log cannot keep ends the node, with the file's name; no
    promise is broken."""
    volume = Volume(size=SIZE, facets=1 if whose == "remote" else 2)
    cluster = make_cluster(volumes=[volume], log_size=4 * MIB)
    node = cluster.primary
    journal = Journal(SIZE)
    with tmpfs(node.directory / "state", 24 * MIB) as disk:
        cluster.start()
        if whose == "remote":
            cluster.proxy.refuse()
        else:
            node.ok("facet", "offline", str(node.facets("data")[1]))
        with (disk / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while True:
                ballast.write(bytes(65536))
        with Load(node.nbd_socket, journal, sectors_max=512) as load:
            ended = run_until_broken(load, 60) or bool(load.failures)
            assert load.successes_after_failure == 0
        assert ended, "the map's page had room"
        assert wait_death(node) == 1
        check_message(node, "No space left", "dcm/beta.data" if whose == "remote" else "dcm/@")
        (disk / "ballast").unlink()
        node.start()
        cluster.proxy.heal()
        if whose == "facet":
            online = ("facet", "online", str(node.facets("data")[1]), "--wait", "--timeout", "30")
            node.ok(*online)
        check_serves(cluster, journal)
        check_equal(cluster)
        for one in reversed(cluster.nodes):
            one.stop()


def grow(disk: Path, size: int) -> None:
    """Somebody frees space."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


@requires_programs("strace")
def test_read_error_in_a_resync(make_cluster: MakeCluster) -> None:
    """Fault 14: a region cannot be read from the facet: it stays marked and is reported; other
    regions arrive, and so does this one when the disk reads again."""
    cluster = small_group(make_cluster, log_size=4 * MIB).start()
    journal = Journal(SIZE)
    node = cluster.primary
    with Load(node.nbd_socket, journal) as load:
        cluster.proxy.refuse()
        node.until("lost its link", lambda one: one["link"] != "connected")
        load.run(20)
        node.rpc("resync", remote="beta", full=True)
        node.kill()
    path = files(node)["facet"]
    assert start_under(node, strace("pread64,preadv2,preadv", "error=EIO", "3+2", path=path))
    cluster.proxy.heal()
    entry = node.until("says why", lambda one: one["why"] and "read" in one["why"])
    assert entry["state"] != "synchronised" and entry["dirty"]["regions"] > 0
    bury(node)
    node.start()
    check_serves(cluster, journal)
    check_equal(cluster)


@requires_programs("strace")
@pytest.mark.parametrize("side", ["primary", "secondary"])
def test_stalled_disk(make_cluster: MakeCluster, side: str) -> None:
    """Fault 17: every sync takes 2.5 s, more than the link's time-out: heartbeats go on, the link
    stays, writes without FLUSH go on; nothing fails over or resyncs."""
    cluster = small_group(make_cluster).start()
    journal = Journal(SIZE)
    node: Node = getattr(cluster, side)
    node.stop()
    delay = "delay_enter=2500000"
    assert start_under(node, strace("fdatasync", delay, "4+", path=files(node)["log"]))
    cluster.primary.until("is connected", lambda one: one["link"] == "connected")
    since = cluster.primary.events()[-1]["cursor"]
    path = cluster.primary.nbd_socket
    load = Load(path, journal, flush_every=NEVER, fua=0, timeout=STALL_S)
    with load, Background(load, pause_s=0.03):
        # What must not happen has had the time to.
        time.sleep(1.6 * cluster.tuning["timeout_seconds"])
    kinds = [event["kind"] for event in cluster.primary.events(since)]
    assert "disconnected" not in kinds and "handshake" not in kinds, kinds
    bury(node)
    node.start()
    check_serves(cluster, journal)
    check_equal(cluster)


@requires_programs("qemu-storage-daemon")
@needs_root
def test_frozen_disk(make_cluster: MakeCluster) -> None:
    """Fault 17: the secondary's facet is on a disk that does not answer at all for a time: its
    heartbeats go on, the primary's client notices nothing, and all ends equal."""
    cluster = small_group(make_cluster)
    cluster.create()
    path = files(cluster.secondary)["facet"]
    image = path.with_suffix(".disk")
    path.rename(image)
    journal = Journal(SIZE)
    with StorageDaemon(path, image, ["driver=raw,node-name=top,file=image,discard=unmap"]) as disk:
        for node in cluster.nodes:
            node.start()
        check_equal(cluster)
        with Load(cluster.primary.nbd_socket, journal, timeout=STALL_S) as load:
            disk.process.freeze()
            with Background(load, pause_s=0.01):
                # Longer than what takes silence for death.
                time.sleep(3 * cluster.tuning["timeout_seconds"] / 2)
                assert cluster.primary.remote()["lag"]["records"] > 0
            disk.process.thaw()
        check_equal(cluster)
        for node in reversed(cluster.nodes):
            node.stop()
