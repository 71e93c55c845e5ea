"""Where faults come from: system calls that fail or kill, small and lying disks, other boots.

Owns: strace's command line, tmpfs mounts, FUSE exports of qemu-storage-daemon, starting a node
beneath them, its exit. Decides nothing about what must follow. Used by the tests of this package.

Counts are per system call and thread: ``when`` names the Nth call of that name by one thread.
Writes are made by the main thread, syncs and holes by others.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdmirror.codec import slots
from nbdmirror.engine.store import FILE_NAME
from tests.faults.journal import Broken, Journal, Load
from tests.integration.cluster import READY_S, Cluster, Node, nbdmirror
from tests.integration.process import Process, ProcessError, wait_until

POINTS = os.environ.get("FAULT_POINTS")
"""``all``: a sweep goes through every point; ``flushes``: ``test_power`` through every flush."""
ALL_POINTS = POINTS == "all"
DISK_CALLS = ("pwritev2", "pwrite64", "fdatasync", "fallocate")
"""What the daemon does to disks: log; facets, maps and superblock; all; holes."""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


# -- system calls ----------------------------------------------------------------------------------


def strace(calls: str, action: str, when: str | int = 1, *, path: Path | None = None) -> list[str]:
    """The prefix of a command line that does ``action`` (``signal=KILL``, ``error=EIO``,
    ``retval=512``) to the calls numbered ``when`` (``N``, ``N+``); on ``path`` alone if given.

    The daemon stays this process's child, and its process id the one that was started."""
    only = ["-P", str(path)] if path else []
    inject = f"inject={calls}:{action}:when={when}"
    return ["strace", "-D", "-f", "-qqq", "-o", "/dev/null", *only] + [
        "-e",
        f"trace={calls}",
        "-e",
        inject,
    ]


class Victim(Process):
    """A process that is expected to end by itself; its tracer may see the end before us."""

    def failure(self, what: str) -> ProcessError:
        if what.startswith("ended"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(10)
        return super().failure(what)


def start_under(node: Node, prefix: Sequence[str], code: int = -9) -> bool:
    """Starts the node's daemon behind a prefix; whether it got ready. Else it has ended, with
    this exit code."""
    assert not node.alive
    argv = [*prefix, sys.executable, "-m", "nbdmirror", "serve", str(node.config)]
    try:
        node.process = Victim(node.name, argv, node.directory / "output", notify=READY_S)
    except ProcessError as error:
        assert f"; exit {code}\n" in str(error), error
        node.process = None
        return False
    return True


def wait_death(node: Node, seconds: float = 30.0) -> int:
    """Returns the exit code of a daemon that ends by itself."""
    wait_until(f"{node.name} ends", lambda: not node.alive, seconds)
    return bury(node)


def bury(node: Node) -> int:
    """Kills the daemon if it still runs, and releases what belonged to it; its exit code."""
    node.kill()
    code: int = node.daemon.popen.returncode
    return code


def serve_fails(node: Node) -> str:
    """``serve`` must end with exit code 1 and a message that it returns; never a traceback."""
    result = nbdmirror("serve", str(node.config), timeout=60)
    assert result.code == 1, result
    assert "Traceback" not in result.err, result
    assert result.err.strip(), "no message"
    return result.err


def check_message(node: Node, *words: str) -> None:
    """The daemon's output holds these words, and no traceback. It may come to: the journal has a
    thread of its own, and a daemon may be ready a moment before what it has said is written."""

    def written() -> bool:
        output = node.daemon.output(60)
        assert "Traceback" not in output, output
        return all(word in output for word in words)

    wait_until(f"{node.name} says {words}", written)


# -- what must hold afterwards ---------------------------------------------------------------------


def check_serves(cluster: Cluster, journal: Journal, *, durable: bool = False) -> None:
    """The primary serves what it promised; the journal goes on from there."""
    with Load(cluster.primary.nbd_socket, journal) as load:
        image = load.read()
    journal.check(image, durable=durable)
    journal.settle(image)


def check_equal(cluster: Cluster, seconds: float = 40.0) -> None:
    """In sync, and every facet equal bit for bit (I2). Cheaper than through the command line."""
    try:
        cluster.primary.rpc("wait", until="in-sync", timeout=seconds)
    except (AssertionError, OSError) as error:
        outputs = [f"{node.name}: {node.daemon.output()}" for node in cluster.nodes]
        raise AssertionError("\n".join([str(error), *outputs])) from error
    cluster.compare()


def is_in_sync(cluster: Cluster) -> bool:
    """Whether the primary says so; not so if nobody answers there."""
    try:
        cluster.primary.rpc("wait", until="in-sync", timeout=0.05)
    except (AssertionError, OSError, ValueError):
        return False
    return True


def resyncs(cluster: Cluster) -> list[dict[str, Any]]:
    """Handshakes of this run of the primary that led to more than going on in the log."""
    return [
        event
        for event in cluster.primary.events()
        if event["kind"] == "handshake" and event["action"] != "continue"
    ]


def run_until_broken(load: Load, batches: int) -> bool:
    """Whether the load's connection ended within so many batches."""
    try:
        load.run(batches)
    except Broken:
        return True
    return False


# -- boots -----------------------------------------------------------------------------------------


def edit_superblock(node: Node, **changes: object) -> dict[str, Any]:
    """Changes fields of a stopped node's superblock; returns the state as it is now."""
    path = node.directory / "state" / FILE_NAME
    with path.open("r+b") as file:
        images = [file.read(slots.SLOT_SIZE) for _ in range(slots.SLOT_COUNT)]
        index, counter, state = slots.choose(images)
        state.update(changes)
        file.seek((1 - index) * slots.SLOT_SIZE)
        file.write(slots.encode(counter + 1, state))
    return state


def reboot(node: Node) -> None:
    """The dead node's next start will be in another boot of the machine."""
    edit_superblock(node, boot_id="00000000-0000-0000-0000-000000000000")


# -- disks -----------------------------------------------------------------------------------------


@contextmanager
def tmpfs(path: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes at ``path``."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(path)], check=True
    )
    try:
        yield path
    finally:
        unmount(path)


def unmount(path: Path) -> None:
    """Unmounts, whoever still uses it."""
    subprocess.run(["umount", "-l", str(path)], check=True)


class StorageDaemon:
    """qemu-storage-daemon, exporting one block node as the regular file ``path``; its content is
    in ``image``. A context manager."""

    def __init__(self, path: Path, image: Path, filters: Sequence[str]) -> None:
        """``filters``: further ``--blockdev`` options; the node ``top`` is exported, ``image`` is
        what the lowest has to name; without ``discard=unmap`` in each, holes are not made."""
        self.path = path
        path.touch()
        blockdevs = [f"driver=file,node-name=image,filename={image},discard=unmap", *filters]
        argv = ["qemu-storage-daemon"]
        for option in blockdevs:
            argv += ["--blockdev", option]
        export = f"type=fuse,id=export,node-name=top,mountpoint={path},writable=on"
        argv += ["--export", export]
        self.process = Process("qemu-storage-daemon", argv, path.with_suffix(".qsd"))
        size = image.stat().st_size
        wait_until("the FUSE export is there", lambda: path.stat().st_size == size)

    def __enter__(self) -> StorageDaemon:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.process.thaw()
        self.process.stop()


def requires_programs(*names: str) -> pytest.MarkDecorator:
    """Skips where a program is missing."""
    missing = [name for name in names if shutil.which(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
