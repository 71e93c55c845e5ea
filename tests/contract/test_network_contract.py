"""``network_contract`` against asyncio, uvloop and the simulated network."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from nbdmirror.config import MIB
from nbdmirror.edge.net import LinuxNetwork
from nbdmirror.ports import Network
from tests.contract.network_contract import NetworkContract, NetworkWorld
from tests.sim.loop import SimLoop
from tests.sim.net import SimNet
from tests.sim.transport import Link


class LinuxWorld:
    overfull = 16 * MIB  # the kernel lets a socket's buffers grow to several MiB

    def __init__(self, loop: asyncio.AbstractEventLoop, path: Path) -> None:
        self.near: Network = LinuxNetwork()
        self.far: Network = LinuxNetwork()
        self.addresses: tuple[str, ...] = ("tcp:127.0.0.1:0", f"unix:{path}/socket")
        self._loop = loop

    def run(self, main: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(main)

    def close(self) -> None:
        self._loop.run_until_complete(asyncio.sleep(0))  # closing sockets takes one more turn
        self._loop.close()


class SimWorld:
    def __init__(self, seed: int, link: Link) -> None:
        self._loop = SimLoop()
        net = SimNet(self._loop, seed, link=link)
        self.overfull = 8 * link.window
        self.near: Network = net.host("alpha")
        self.far: Network = net.host("beta")
        self.addresses: tuple[str, ...] = ("tcp:beta:0",)

    def run(self, main: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(main)

    def close(self) -> None:
        self._loop.close()
        assert self._loop.errors == []


class SimLocalWorld(SimWorld):
    """Two processes of one simulated host."""

    def __init__(self, seed: int, link: Link) -> None:
        super().__init__(seed, link)
        self.near = self.far
        self.addresses = ("tcp:127.0.0.1:0", "unix:/run/socket")


@pytest.fixture(params=["asyncio", "uvloop", "sim", "sim-slow", "sim-local"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NetworkWorld]:
    made: LinuxWorld | SimWorld
    match request.param:
        case "asyncio":
            made = LinuxWorld(asyncio.SelectorEventLoop(), tmp_path)
        case "uvloop":
            made = LinuxWorld(uvloop.new_event_loop(), tmp_path)
        case "sim-slow":
            made = SimWorld(2, Link(latency=(0.01, 0.05), bandwidth=50e6, split=0.9, window=8192))
        case "sim-local":
            made = SimLocalWorld(3, Link())
        case _:
            made = SimWorld(1, Link())
    yield made
    made.close()


class TestNetwork(NetworkContract):
    pass
