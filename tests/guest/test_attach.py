"""Row X7: a mounted filesystem waits over SIGKILL and restart of the server, and sees no error."""

from __future__ import annotations

from pathlib import Path

from tests.guest import guest
from tests.guest.kernel import TREE
from tests.integration.cluster import Cluster
from tests.integration.process import Process, free_port

SECONDS = 400.0


class Nbdkit:
    """The same promise asked of a server that is not ours: is it the watcher that keeps it?

    One thread: Debian's nbdkit aborts when a client with requests in flight goes."""

    def __init__(self, directory: Path) -> None:
        self.image = directory / "image"
        self.image.touch()
        with self.image.open("r+b") as file:
            file.truncate(256 << 20)
        self.log = directory / "nbdkit.log"
        self.port = free_port()
        self.start()

    def start(self) -> None:
        """Starts it; returns when it listens."""
        argv = ["nbdkit", "-f", "-t", "1", "-i", "127.0.0.1", "-p", str(self.port)]
        self.process = Process(
            "nbdkit",
            [*argv, "file", str(self.image)],
            self.log,
            listens=f"tcp:127.0.0.1:{self.port}",
        )

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()


def carry_over(uri: str, server: Nbdkit | Cluster) -> None:
    """Runs the job against a server that it has killed and started again."""
    target = server if isinstance(server, Nbdkit) else server.primary

    def answer(words: list[str]) -> None:
        {"kill": target.kill, "start": target.start}[words[0]]()

    environment = {"URI": uri, "TREE": str(TREE)}
    guest.run("attach", SECONDS, environment=environment, answer=answer).check()


def test_nbdkit_restart(tmp_path: Path) -> None:
    """X7's client side alone, with a plain file server."""
    server = Nbdkit(tmp_path)
    try:
        carry_over(f"nbd://{guest.HOST_ADDRESS}:{server.port}/", server)
    finally:
        server.kill()


def test_nbdmirror_restart(tmp_path: Path) -> None:
    """X7: the primary's daemon is killed under a mounted, busy filesystem; then all is in sync."""
    with Cluster(tmp_path / "group", tcp=True) as cluster:
        cluster.start()
        uri = f"nbd://{guest.HOST_ADDRESS}:{cluster.primary.nbd_port}/data"
        carry_over(uri, cluster)
        cluster.check_in_sync()
