"""The connections of a primary (M2, M13)."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest

from nbdmirror.engine.create import create
from nbdmirror.engine.node import Node
from nbdmirror.errors import Refused
from nbdmirror.ports import Env
from tests.fuzz.nodes import Doorkeeper, Factory, config_of
from tests.sim.clock import SimClock
from tests.unit.world import make_disk, run


def test_no_link_begins_in_a_node_that_stops() -> None:
    """M13: who goes on without the log ends the links and begins them anew, perhaps after a stop
    has ended them; a link that was only moved begins again."""

    async def main() -> None:
        disk, config = make_disk(), config_of("primary")
        clock = SimClock(asyncio.get_running_loop(), disk)  # type: ignore[arg-type]
        env = Env(disk, Doorkeeper(), clock, random.Random(0))
        await create(env, config, "primary")
        node = Node(env, config)
        await node.start()
        primary = node.primary
        assert primary is not None

        async def links(*, for_good: bool) -> set[asyncio.Task[None]]:
            before = asyncio.all_tasks()
            await primary.stop(for_good=for_good)
            primary.start()
            return asyncio.all_tasks() - before

        assert await links(for_good=False)
        assert not await links(for_good=True)
        await node.stop()

    run(main())


class _Silence(Doorkeeper):
    """A network where nobody answers who connects, and nobody says so."""

    def __init__(self) -> None:
        super().__init__()
        self.began: list[float] = []
        self.ended: list[float] = []

    async def connect(self, address: str, protocol: Factory) -> asyncio.Transport:
        time = asyncio.get_running_loop().time
        self.began.append(time())
        try:
            await asyncio.sleep(1000)
        finally:
            self.ended.append(time())
        raise AssertionError("waited for as long as the kernel tries")


async def _started(network: Any, **remote: Any) -> Node:
    disk, config = make_disk(), config_of("primary")
    config = replace(config, remotes=tuple(replace(one, **remote) for one in config.remotes))
    clock = SimClock(asyncio.get_running_loop(), disk)  # type: ignore[arg-type]
    env = Env(disk, network, clock, random.Random(0))
    await create(env, config, "primary")
    node = Node(env, config)
    await node.start()
    return node


def test_an_attempt_to_connect_ends() -> None:
    """M2: where the packets of who connects are dropped it is tried again in the time that a link
    may be silent, and a command is followed at once."""

    async def main() -> None:
        network = _Silence()
        node = await _started(network)
        seconds = node.config.replication.timeout_seconds
        await asyncio.sleep(3.5 * seconds)
        assert len(network.began) >= 3
        assert network.ended[0] - network.began[0] == seconds
        while len(network.began) == len(network.ended):
            await asyncio.sleep(0.1)
        await asyncio.sleep(seconds / 2)
        attempts = len(network.began)
        await node.pause("b")
        await asyncio.sleep(1.0)
        assert len(network.ended) == attempts == len(network.began)
        await node.resume("b")
        await asyncio.sleep(1.0)
        assert len(network.began) == attempts + 1
        await node.stop()
        assert len(network.ended) == attempts + 1

    run(main())


class _Turned(Doorkeeper):
    """A network where a stranger turns the first attempts away; then nobody is there."""

    async def connect(self, address: str, protocol: Factory) -> asyncio.Transport:
        if asyncio.get_running_loop().time() < 60.0:
            raise Refused("tls: wrong name")
        raise ConnectionRefusedError(address)


def test_a_refusal_is_told_of_as_long_as_it_is_the_cause() -> None:
    """X4: what the last attempt came to is what a person reads."""

    async def main() -> None:
        node = await _started(_Turned())
        await asyncio.sleep(50.0)
        (shown,) = node.status()["remotes"]
        assert (shown["state"], shown["why"]) == ("refused", "tls: wrong name")
        await asyncio.sleep(50.0)
        (shown,) = node.status()["remotes"]
        assert (shown["state"], shown["why"]) == ("uninitialised", None)
        assert "mend the network" in shown["next_action"]
        await node.stop()

    run(main())


def test_writes_that_wait_from_the_start_on_are_told_of() -> None:
    """X4, I8: a remote that writes wait for is away as the primary starts."""

    async def main() -> None:
        node = await _started(_Turned(), mode="sync", on_link_loss="hold")
        await asyncio.sleep(5.0)
        kinds = [event["kind"] for event in node.events.since(0).events]
        assert kinds.count("out-of-step") == 1
        (shown,) = node.status()["remotes"]
        assert "no write is carried out until then: nbdmirror pause b" in shown["next_action"]
        await node.pause("b")
        (shown,) = node.status()["remotes"]
        assert shown["next_action"] == "nbdmirror resume b"
        await node.stop()

    run(main())


@pytest.mark.parametrize("twice", [False, True])
def test_a_start_does_not_undo_what_commands_made_of_a_remote(twice: bool) -> None:
    """M17: removed, and added at another address; and perhaps removed there too. The configuration
    is heard again when it names another address."""

    async def main() -> None:
        node = await _started(_Turned())
        env = node.env
        await node.remote_remove("b")
        await node.remote_add("b", "unix:/elsewhere", "async", "continue")
        if twice:
            await node.remote_remove("b")

        async def after(address: str) -> list[str]:
            nonlocal node
            await node.stop()
            remotes = (replace(node.config.remotes[0], address=address),)
            node = Node(env, replace(node.config, remotes=remotes))
            await node.start()
            return [remote["address"] for remote in node.status()["remotes"]]

        for _ in range(2):
            assert await after("unix:/b") == ([] if twice else ["unix:/elsewhere"])
            assert [e["kind"] for e in node.events.since(0).events].count("remote-left-out") == 1
        assert await after("unix:/third") == ["unix:/third"]
        assert await after("unix:/b") == ["unix:/b"]
        await node.stop()

    run(main())
