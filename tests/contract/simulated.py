"""What the tests of the simulated world share."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from typing import Any

from tests.contract.network_contract import Peer
from tests.sim.loop import Incarnation, SimLoop
from tests.sim.net import SimNet
from tests.sim.transport import Link


def run(main: Coroutine[Any, Any, Any], loop: SimLoop | None = None) -> Any:
    loop = loop or SimLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()
        assert loop.errors == []


class Hosts:
    """Two hosts, each with a life, and a connection between them."""

    def __init__(
        self, seed: int = 1, link: Link | None = None, shuffle: random.Random | None = None
    ) -> None:
        self.loop = SimLoop(shuffle=shuffle)
        self.net = SimNet(self.loop, seed, link=link)
        self.lives = {name: Incarnation(name) for name in ("alpha", "beta")}
        self.client = Peer()
        self.server = Peer()

    async def start(self) -> None:
        async def listen() -> None:
            await self.net.host("beta").listen("tcp:0.0.0.0:1", lambda: self.server)

        async def connect() -> None:
            await self.net.host("alpha").connect("tcp:beta:1", lambda: self.client)

        await self.loop.spawn(self.lives["beta"], listen())
        await self.loop.spawn(self.lives["alpha"], connect())
        await self.server.made.wait()

    def write(self, data: bytes) -> None:
        self.loop.spawn(self.lives["alpha"], self._write(data))

    async def _write(self, data: bytes) -> None:
        self.client.transport.write(data)

    def kill(self, name: str, *, power: bool) -> None:
        self.lives[name].kill()
        self.net.kill(self.lives[name], power=power)


def scene(test: Callable[[Hosts], Coroutine[Any, Any, None]], hosts: Hosts | None = None) -> Hosts:
    hosts = hosts or Hosts()

    async def main(hosts: Hosts) -> None:
        await hosts.start()
        await test(hosts)

    run(main(hosts), hosts.loop)
    return hosts
