"""Fixtures of the integration tests: bounded time, both front ends, clusters, a shared server.

``NBDMIRROR_FRONTENDS=native`` runs one front end only. ``NBDMIRROR_REFERENCE=1`` adds nbdkit's own
memory server beside ours, where a test is about NBD alone: what it refuses there is the test's
mistake, not ours.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.cluster import MIB, Cluster, Volume
from tests.integration.pki import Authority
from tests.integration.process import Process

TEST_S = 180
POOL = 40
POOL_SIZE = 32 * MIB
FRONTENDS = os.environ.get("NBDMIRROR_FRONTENDS", "native,nbdkit").split(",")
SERVERS = [*FRONTENDS, *(["reference"] if os.environ.get("NBDMIRROR_REFERENCE") else [])]


class TestTimedOut(Exception):
    """A test took longer than any test may."""

    __test__ = False


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    """No test hangs: after ``TEST_S`` it fails, and if that does not help the run ends."""

    def expired(*_: object) -> None:
        raise TestTimedOut(f"longer than {TEST_S} s")

    previous = signal.signal(signal.SIGALRM, expired)
    signal.alarm(TEST_S)
    faulthandler.dump_traceback_later(TEST_S + 60, exit=True)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture(params=FRONTENDS)
def frontend(request: pytest.FixtureRequest) -> str:
    """Each front end in turn."""
    name: str = request.param
    return name


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Makes clusters (as ``Cluster``'s arguments say); they end with the test."""
    made: list[Cluster] = []

    def make(**options: Any) -> Cluster:
        made.append(Cluster(tmp_path / f"cluster{len(made)}", **options))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The CA of the group, with two nodes and two clients."""
    made = Authority(tmp_path_factory.mktemp("ca") / "ca")
    for node in ("alpha", "beta"):
        made.node(node)
    for client in ("laptop", "backup"):
        made.client(client)
    return made


class Server(ABC):
    """A server whose volumes tests use up: each takes a fresh one and leaves it as it is."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="nbdm-"))
        self.volumes = [f"v{number:02}" for number in range(POOL)]
        self._unused = iter(self.volumes)

    @abstractmethod
    def start(self) -> None:
        """Starts it, or starts it again after a test killed it."""

    @property
    @abstractmethod
    def socket(self) -> Path:
        """The path of its unix socket."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether it runs."""

    def uri(self, volume: str = "") -> str:
        """The URI of an export; without a name, of the default one."""
        return f"nbd+unix:///{volume}?socket={self.socket}"

    def fresh(self) -> str:
        """A volume that no other test has used."""
        return next(self._unused)

    def close(self) -> None:
        """Ends it."""
        shutil.rmtree(self.directory, ignore_errors=True)


class ReferenceServer(Server):
    """nbdkit's own file server; one thread, because hang-ups abort Debian's otherwise."""

    def start(self) -> None:
        data = self.directory / "data"
        data.mkdir(exist_ok=True)
        for name in self.volumes:
            with (data / name).open("ab") as file:
                file.truncate(POOL_SIZE)
        self.socket.unlink(missing_ok=True)
        argv = ["nbdkit", "-f", "-t", "1", "-U", str(self.socket), "--filter=exportname"]
        argv += ["file", f"dir={data}", f"default-export={self.volumes[0]}"]
        log = self.directory / "log"
        self.process = Process("nbdkit", argv, log, listens=f"unix:{self.socket}")

    @property
    def socket(self) -> Path:
        return self.directory / "nbd"

    @property
    def alive(self) -> bool:
        return self.process.alive

    def close(self) -> None:
        self.process.kill()
        super().close()


class MirroredServer(Server):
    """Our primary with a connected secondary: whatever clients do, both must end up equal."""

    def __init__(self, frontend: str) -> None:
        super().__init__()
        self.cluster = Cluster(
            self.directory / "group",
            volumes=[Volume(name, POOL_SIZE) for name in self.volumes],
            frontend=frontend,
            tcp=True,
        )

    def start(self) -> None:
        if self.cluster.primary.starts:
            self.cluster.primary.start()
        else:
            self.cluster.start()

    @property
    def socket(self) -> Path:
        return self.cluster.primary.nbd_socket

    @property
    def alive(self) -> bool:
        return self.cluster.primary.alive

    def close(self) -> None:
        try:
            self.cluster.check_in_sync()
        finally:
            self.cluster.close()
            super().close()


@pytest.fixture(scope="module", params=SERVERS)
def shared_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """One server for all tests of a module; at the end its two nodes are compared."""
    reference = request.param == "reference"
    server = ReferenceServer() if reference else MirroredServer(request.param)
    server.start()
    yield server
    server.close()


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """The module's server, alive before and after the test."""
    if not shared_server.alive:
        shared_server.start()
    yield shared_server
    assert shared_server.alive, "the test ended the server"


@pytest.fixture
def volume(server: Server) -> str:
    """The URI of a fresh volume of zeros."""
    return server.uri(server.fresh())


@pytest.fixture
def native(mirrored: MirroredServer) -> MirroredServer:
    """Our own NBD server: what nbdkit's core decides or cannot do is not asked of it."""
    if mirrored.cluster.frontend != "native":
        pytest.skip("nbdkit cannot do this")
    return mirrored


@pytest.fixture
def mirrored(server: Server) -> MirroredServer:
    """The server where it must be ours."""
    if not isinstance(server, MirroredServer):
        pytest.skip("about our server")
    return server
