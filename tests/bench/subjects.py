"""What is measured: servers over the same kind of unix socket, on files of the same filesystem.

A subject is prepared once (its files, filled with the same random bytes, every block allocated)
and started afresh, with new processes, for each measurement. The remote of a mirror is another
process on this machine: ours over TCP on loopback, as in use; the peer's over a unix socket,
because over TCP it waits for delayed acknowledgements and would be at a disadvantage.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path

from tests.bench.qmp import Qmp
from tests.integration.cluster import Cluster, Volume
from tests.integration.pki import Authority, tls_line
from tests.integration.process import Process, accepts, wait_until

DRAIN_S = 120.0
SYNC_S = 600.0


class Subject(ABC):
    """One server under measurement."""

    name = ""
    what = ""
    mirrored = True

    def __init__(self, directory: Path) -> None:
        self.directory = directory / self.name
        self.directory.mkdir(parents=True)
        self.sockets = Path(tempfile.mkdtemp(prefix="nbdb-"))
        self.processes: list[Process | Detached] = []

    @abstractmethod
    def prepare(self, source: Path) -> None:
        """Makes the files, each a full copy of ``source``."""

    @abstractmethod
    def start(self) -> str:
        """Starts the processes; a mirror is in sync on return. Returns the NBD URI."""

    @property
    @abstractmethod
    def files(self) -> list[Path]:
        """The data files: the one that clients see first, copies behind it."""

    @abstractmethod
    def drain(self) -> None:
        """Returns when the copy holds everything that was written; after it only ``stop``."""

    def stop(self) -> None:
        """Ends the processes."""
        for process in reversed(self.processes):
            process.stop()
        self.processes.clear()

    def close(self) -> None:
        """Kills what runs and removes the sockets."""
        for process in self.processes:
            process.kill()
        shutil.rmtree(self.sockets, ignore_errors=True)

    def check_copies(self) -> None:
        """After a stop: the copies equal the first file byte by byte, or the figures are void."""
        first, *copies = self.files
        for path in copies:
            subprocess.run(["cmp", str(first), str(path)], check=True)

    def copy(self, source: Path) -> None:
        """Fills every file."""
        for path in self.files:
            shutil.copyfile(source, path)

    def launch(self, name: str, argv: list[str], listens: str) -> Process:
        """Starts one process of the subject and waits until it accepts at ``listens``."""
        process = Process(name, argv, self.directory / f"{name}.log", listens=listens)
        self.processes.append(process)
        return process


class NbdkitFile(Subject):
    """The limit: a server in C that copies nothing anywhere."""

    name = "nbdkit"
    what = "nbdkit file, no mirror"
    mirrored = False

    def prepare(self, source: Path) -> None:
        self.copy(source)

    @property
    def files(self) -> list[Path]:
        return [self.directory / "data.img"]

    def start(self) -> str:
        path = self.sockets / "nbd"
        argv = ["nbdkit", "-f", "-U", str(path), "file", str(self.files[0])]
        path.unlink(missing_ok=True)
        self.launch("nbdkit", argv, f"unix:{path}")
        return f"nbd+unix:///?socket={path}"

    def drain(self) -> None:
        """There is no copy."""


class Detached:
    """A server that leaves for the background and writes its number to a file."""

    def __init__(self, argv: list[str], pid_file: Path, listens: str) -> None:
        subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        self.pid = int(wait_until(f"{argv[0]} says its number", pid_file.read_text))
        wait_until(f"{argv[0]} listens", lambda: accepts(listens))

    def _end(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)
        wait_until(f"process {self.pid} ends", lambda: not Path(f"/proc/{self.pid}").exists())

    def stop(self) -> None:
        """SIGTERM; AssertionError if it does not end."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL)


class NbdServer(NbdkitFile):
    """The other limit: the reference server, a process for each client."""

    name = "nbd-server"
    what = "nbd-server, no mirror"

    def start(self) -> str:
        path, config = self.sockets / "nbd", self.directory / "config"
        path.unlink(missing_ok=True)
        config.write_text(
            f"[generic]\nunixsock = {path}\nallowlist = true\n"
            f"[data]\nexportname = {self.files[0]}\nflush = true\nfua = true\n"
        )
        number = self.directory / "pid"
        number.write_text("")
        argv = ["nbd-server", "-C", str(config), "-p", str(number)]
        self.processes.append(Detached(argv, number, f"unix:{path}"))
        return f"nbd+unix:///data?socket={path}"


class QemuMirror(Subject):
    """The peer: qemu-storage-daemon with a mirror job to an NBD target in a second one."""

    copy_mode = "background"

    def prepare(self, source: Path) -> None:
        self.copy(source)

    @property
    def files(self) -> list[Path]:
        return [self.directory / "data.img", self.directory / "copy.img"]

    def _blockdevs(self, path: Path) -> list[str]:
        common = "discard=unmap,cache.direct=off"
        return [
            f"--blockdev=driver=file,node-name=file,filename={path},{common}",
            "--blockdev=driver=raw,node-name=data,file=file,discard=unmap",
        ]

    def _target(self) -> Path:
        path = self.sockets / "target"
        path.unlink(missing_ok=True)
        argv = ["qemu-storage-daemon", *self._blockdevs(self.files[1])]
        argv += [
            f"--nbd-server=addr.type=unix,addr.path={path}",
            "--export=type=nbd,id=out,node-name=data,name=data,writable=on",
        ]
        self.launch("target", argv, f"unix:{path}")
        return path

    def start(self) -> str:
        target = self._target()
        path, monitor = self.sockets / "nbd", self.sockets / "qmp"
        for old in (path, monitor):
            old.unlink(missing_ok=True)
        server = f"server.type=unix,server.path={target}"
        argv = ["qemu-storage-daemon", *self._blockdevs(self.files[0])]
        argv += [
            f"--blockdev=driver=nbd,node-name=copy,export=data,discard=unmap,{server}",
            f"--chardev=socket,id=qmp,path={monitor},server=on,wait=off",
            "--monitor=chardev=qmp",
            f"--nbd-server=addr.type=unix,addr.path={path}",
            "--export=type=nbd,id=out,node-name=data,name=data,writable=on",
        ]
        self.launch("source", argv, f"unix:{path}")
        self.qmp = Qmp(monitor)
        # Both files are equal: "none" copies only what is written from now on.
        self.qmp.execute(
            "blockdev-mirror",
            job_id="mirror",
            device="data",
            target="copy",
            sync="none",
            copy_mode=self.copy_mode,
        )
        self.qmp.wait_event("BLOCK_JOB_READY")
        return f"nbd+unix:///data?socket={path}"

    def drain(self) -> None:
        # The job's progress lags behind; its end, when not forced, is a consistent copy.
        self.qmp.execute("block-job-cancel", device="mirror")
        self.qmp.wait_event("BLOCK_JOB_COMPLETED")

    def stop(self) -> None:
        if self.qmp.execute("query-block-jobs"):
            self.drain()
        self.qmp.close()
        super().stop()


class QemuBackground(QemuMirror):
    """Copies behind the client's back: asynchronous, as our remote is."""

    name = "qemu-bg"
    what = "qemu mirror, copy-mode background"


class QemuBlocking(QemuMirror):
    """A write waits for the copy: always in step."""

    name = "qemu-wb"
    what = "qemu mirror, copy-mode write-blocking"
    copy_mode = "write-blocking"


class Nbdmirror(Subject):
    """Ours: one local facet, one connected asynchronous remote, ``disk`` log."""

    name = "nbdmirror"
    what = "nbdmirror, one async remote"
    frontend = "native"
    log_mode = "disk"
    facets = 1
    remotes: tuple[str, ...] = ("beta",)
    compression = "off"

    def prepare(self, source: Path) -> None:
        self.cluster = Cluster(
            self.directory / "group",
            volumes=[Volume(size=source.stat().st_size, facets=self.facets)],
            remotes=self.remotes,
            log_size=1 << 30,
            log_mode=self.log_mode,
            frontend=self.frontend,
            proxied=False,
            remote_keys={"compression": self.compression},
            tuning={},
        )
        self.copy(source)
        self.cluster.create()

    @property
    def files(self) -> list[Path]:
        nodes = [self.cluster.primary, *self.cluster.secondaries]
        return [path for node in nodes for path in node.facets("data")]

    def start(self) -> str:
        for node in self.cluster.nodes:
            node.start()
        self.processes = [node.daemon for node in self.cluster.nodes]
        self.cluster.wait_in_sync(SYNC_S)
        return self.cluster.primary.uri("data")

    def drain(self) -> None:
        def caught_up() -> bool:
            remotes = self.cluster.primary.rpc("status")["remotes"]
            return all(
                remote["state"] == "synchronised" and remote["lag"]["records"] == 0
                for remote in remotes
            )

        wait_until("nbdmirror has caught up", caught_up, DRAIN_S)

    def close(self) -> None:
        super().close()
        if hasattr(self, "cluster"):
            self.cluster.close()


class NbdmirrorSpill(Nbdmirror):
    """Ours with the log in memory while the remote keeps up (the remote's own is on disk)."""

    name = "nbdmirror-spill"
    what = "nbdmirror, log mode spill, one async remote"
    log_mode = "spill"


class NbdmirrorNbdkit(Nbdmirror):
    """Ours behind the nbdkit front end."""

    name = "nbdmirror-nbdkit"
    what = "nbdmirror, nbdkit front end, one async remote"
    frontend = "nbdkit"


class NbdmirrorAlone(Nbdmirror):
    """Ours with nobody to replicate to."""

    name = "nbdmirror-alone"
    what = "nbdmirror, no remote"
    mirrored = False
    remotes = ()


class NbdmirrorThree(Nbdmirror):
    """Ours with three copies elsewhere: four daemons on this machine."""

    name = "nbdmirror-three"
    what = "nbdmirror, three async remotes"
    remotes = ("beta", "gamma", "delta")


class NbdmirrorFacets(Nbdmirror):
    """Ours with two local facets, on the primary and on the remote."""

    name = "nbdmirror-facets"
    what = "nbdmirror, two local facets, one async remote"
    facets = 2


class NbdmirrorLz4(Nbdmirror):
    """Ours with lz4 on the link, for data that does not compress: what trying costs."""

    name = "nbdmirror-lz4"
    what = "nbdmirror, lz4, one async remote"
    compression = "lz4"


class NbdmirrorTls(Nbdmirror):
    """Ours with mutual TLS on the link. Clients' TLS is measured in ``tests.bench.tls``: fio cannot
    name the certificates that this server asks for."""

    name = "nbdmirror-tls"
    what = "nbdmirror, TLS on the link, one async remote"

    def prepare(self, source: Path) -> None:
        super().prepare(source)
        authority = Authority(self.directory / "ca")
        for node in self.cluster.nodes:
            node.keys["replication"] = [tls_line(authority.node(node.name))]
            node.write_config()


ALL: list[type[Subject]] = [
    Nbdmirror,
    NbdkitFile,
    NbdServer,
    QemuBackground,
    QemuBlocking,
    NbdmirrorNbdkit,
    NbdmirrorSpill,
    NbdmirrorAlone,
    NbdmirrorThree,
    NbdmirrorFacets,
    NbdmirrorLz4,
    NbdmirrorTls,
]
DEFAULT = ("nbdmirror", "nbdkit", "nbd-server", "qemu-bg", "qemu-wb")
