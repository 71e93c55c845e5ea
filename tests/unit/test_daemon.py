"""What surrounds a node in its process (I6)."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from nbdmirror.config import SnapshotConfig
from nbdmirror.edge import daemon
from nbdmirror.edge.sockets import Sockets
from nbdmirror.errors import DiskFailed
from tests.unit.primary import Primary
from tests.unit.world import make_disk


class _Session:
    """As one is left behind: in a cycle."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("kind", ["disconnected", "connected"])
def test_what_a_link_leaves_behind_is_collected(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """I6: the collector is kept off the data path, and would come by hardly ever."""
    monkeypatch.setattr(daemon, "COLLECT_SECONDS", 0.0)

    async def play() -> None:
        gone = weakref.ref(_Session())
        daemon._collect({"kind": kind})
        for _ in range(2):
            await asyncio.sleep(0)
        assert (gone() is None) == (kind == "disconnected")

    gc.disable()
    try:
        asyncio.run(play())
    finally:
        gc.enable()


def _daemon(told: list[str]) -> daemon.Daemon:
    config = Primary(make_disk(), SnapshotConfig()).config
    return daemon.Daemon(config, Sockets.of({}), tell=told.append)


def test_a_disk_that_fails_while_the_node_stops_is_what_it_ends_with() -> None:
    """O16: with exit code 0 a service manager would ask it again."""

    async def play() -> None:
        one = _daemon([])
        one.node.failed = failed = asyncio.get_running_loop().create_future()

        async def stop() -> None:
            failed.set_result(DiskFailed("sync of the superblock failed"))

        with pytest.MonkeyPatch.context() as patch, pytest.raises(DiskFailed):
            patch.setattr(one.node, "stop", stop)
            await one.finish()

    asyncio.run(play())


def test_a_reload_before_clients_are_served_waits_for_that() -> None:
    """sd_notify: READY=1 ends a reload, and says that they are."""

    async def play() -> None:
        told: list[str] = []
        one = _daemon(told)
        one.reload()
        assert not told
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(one.node), "role", "primary")
            one.ready()
        assert told[0].startswith("READY=1\nSTATUS=") and told[1:] == ["RELOADING=1", "READY=1"]

    asyncio.run(play())
