"""The memory of all clients together: bounded, shared, and nobody holds it for ever (I6)."""

from __future__ import annotations

import asyncio
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

from nbdmirror.codec.nbd import READ, WRITE, Request
from nbdmirror.codec.nbdserver import ServerSession
from nbdmirror.engine.budget import SMALL_BYTES, Budget, Holder
from nbdmirror.engine.underway import REQUEST_BYTES, Underway
from tests.sim.loop import SimLoop

MIB = 1 << 20


class Client:
    """A holder that notes what it is told."""

    def __init__(self, budget: Budget) -> None:
        self.told: list[str] = []
        self.holder = Holder(budget, self._end, lambda: self.told.append("resume"))

    def _end(self) -> None:
        self.told.append("end")
        self.holder.leave()


def test_what_does_not_fit_waits_and_is_told() -> None:
    async def run() -> None:
        budget = Budget(10 * MIB, 10.0)
        one, two = Client(budget), Client(budget)
        assert one.holder.fits(10 * MIB)
        one.holder.change(10 * MIB)
        assert not two.holder.fits(2 * MIB)
        two.holder.wait()
        one.holder.change(-3 * MIB)
        await asyncio.sleep(0)
        assert two.told == ["resume"] and two.holder.fits(2 * MIB)
        assert one.told == []

    SimLoop().run_until_complete(run())


def test_who_holds_nothing_may_begin_something_small() -> None:
    async def run() -> None:
        budget = Budget(MIB, 10.0)
        one, two = Client(budget), Client(budget)
        one.holder.change(MIB)
        assert two.holder.fits(SMALL_BYTES)
        two.holder.change(SMALL_BYTES)
        assert not two.holder.fits(1)
        assert budget.free < 0

    SimLoop().run_until_complete(run())


def test_the_largest_that_stands_still_makes_room() -> None:
    """A client that announced 64 MiB and sends nothing does not keep others waiting for ever."""

    async def run() -> None:
        budget = Budget(10 * MIB, 10.0)
        small, large, moving, late = (Client(budget) for _ in range(4))
        small.holder.change(2 * MIB)
        large.holder.change(5 * MIB)
        moving.holder.change(3 * MIB)
        late.holder.wait()
        await asyncio.sleep(9)
        moving.holder.change(0)
        await asyncio.sleep(2)
        assert large.told == ["end"] and "resume" in late.told
        assert (small.told, moving.told) == ([], [])
        assert budget.ended == 1 and budget.used == 5 * MIB

    SimLoop().run_until_complete(run())


def test_who_waits_for_us_is_not_ended_for_it() -> None:
    """I8: a write waits for room in the log as long as it takes; its client does nothing wrong."""

    async def run() -> None:
        budget = Budget(10 * MIB, 10.0)
        writer, slow, late = (Client(budget) for _ in range(3))
        writer.holder.work(8 * MIB)
        slow.holder.change(2 * MIB)
        late.holder.wait()
        await asyncio.sleep(100)
        assert slow.told == ["end"] and writer.told == []
        writer.holder.leave()
        assert budget.used == writer.holder.delayed == 0

    SimLoop().run_until_complete(run())


def test_what_waiting_writes_were_received_in_counts_once() -> None:
    """All of a buffer stays for the last write in it, however small."""

    async def run() -> None:
        budget, gates = Budget(10 * MIB, 10.0), [asyncio.Event() for _ in range(3)]
        client = Client(budget)
        server: Any = SimpleNamespace(governor=None)
        ended = partial(client.told.append, "ended")
        underway = Underway(server, cast(ServerSession, None), client.holder, ended)
        one, other = memoryview(bytearray(MIB)), memoryview(bytearray(2 * MIB))

        async def wait(gate: asyncio.Event) -> None:
            await gate.wait()

        for gate, view in zip(gates, (one[:512], one[512:1024], other[:512]), strict=True):
            underway.start([Request(WRITE, 0, 1, 0, 512, view)], wait(gate))
        underway.start([Request(READ, 0, 1, 0, MIB)], wait(gates[2]))
        assert budget.used == 4 * MIB + 4 * REQUEST_BYTES and underway.reply_bytes == MIB
        left = []
        for gate in gates:
            gate.set()
            await asyncio.sleep(0.01)
            left.append(budget.used)
        assert left == [4 * MIB + 3 * REQUEST_BYTES, 3 * MIB + 2 * REQUEST_BYTES, 0]
        assert client.told == ["ended"] * 4 and underway.reply_bytes == 0

    SimLoop().run_until_complete(run())


def test_nobody_is_ended_while_nobody_waits() -> None:
    async def run() -> None:
        budget = Budget(MIB, 1.0)
        one = Client(budget)
        one.holder.change(MIB)
        await asyncio.sleep(100)
        assert one.told == []
        one.holder.leave()
        assert budget.used == 0

    SimLoop().run_until_complete(run())
