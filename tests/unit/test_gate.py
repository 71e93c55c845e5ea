"""Replies that wait for a synchronous remote (V3, I3): received, durable, and a lost link."""

from __future__ import annotations

import asyncio

import pytest

from nbdmirror.engine.gate import NEAR_BYTES, SyncGate
from nbdmirror.errors import VolumeFailed
from tests.unit.world import run

HEAD = 1000


def make(policy: str = "continue", *, opened: bool = True) -> SyncGate:
    """A gate at a log whose head is record 1000, each record one byte."""
    gate = SyncGate("beta", policy, lambda seq: HEAD - seq)
    if opened:
        gate.opened(1, True)
    return gate


async def settled(work: asyncio.Task[None]) -> bool:
    """Whether it ends without anything more happening."""
    for _ in range(5):
        await asyncio.sleep(0)
    return work.done()


def test_a_write_waits_for_received_and_a_flush_for_durable() -> None:
    async def main() -> None:
        gate = make()
        write = asyncio.ensure_future(gate.wait(5, False))
        flush = asyncio.ensure_future(gate.wait(5, True))
        assert not await settled(write)
        gate.moved(4, 4)
        assert not await settled(write)
        gate.moved(5, 4)
        assert await settled(write) and not await settled(flush)
        gate.moved(5, 5)
        assert await settled(flush)
        await gate.wait(5, True)

    run(main())


def test_the_lowest_seq_is_woken_first_whoever_asked_first() -> None:
    async def main() -> None:
        gate = make()
        late = asyncio.ensure_future(gate.wait(9, False))
        early = asyncio.ensure_future(gate.wait(2, False))
        assert not await settled(late)
        gate.moved(2, 0)
        assert await settled(early) and not await settled(late)
        gate.moved(9, 0)
        assert await settled(late)

    run(main())


def test_continue_goes_on_and_counts_again_when_near() -> None:
    """No client waits for a backlog; the change is told."""

    async def main() -> None:
        told: list[bool] = []
        head = [10]
        gate = SyncGate("beta", "continue", lambda seq: (head[0] + 1 - seq) * NEAR_BYTES)
        gate.on_change = told.append
        await gate.wait(3, True)
        gate.opened(4, True)
        assert not gate.engaged
        await gate.wait(10, False)
        gate.moved(9, 9)
        assert gate.engaged
        waiting = asyncio.ensure_future(gate.wait(10, False))
        assert not await settled(waiting)
        gate.lost()
        assert await settled(waiting) and told == [True, False]
        assert not gate.shut

    run(main())


def test_hold_waits_until_the_link_is_back() -> None:
    async def main() -> None:
        gate = make("hold")
        waiting = asyncio.ensure_future(gate.wait(7, False))
        gate.moved(6, 6)
        gate.lost()
        admitted = asyncio.ensure_future(gate.admit())
        assert gate.shut and not await settled(waiting) and not await settled(admitted)
        gate.opened(7, True)
        assert await settled(admitted) and not await settled(waiting)
        gate.moved(7, 6)
        assert await settled(waiting)

    run(main())


def test_fail_fails_what_waits_and_what_comes() -> None:
    async def main() -> None:
        gate = make("fail")
        waiting = asyncio.ensure_future(gate.wait(7, False))
        assert not await settled(waiting)
        gate.lost()
        with pytest.raises(VolumeFailed, match="cannot be reached") as caught:
            await waiting
        assert caught.value.errno == 5
        with pytest.raises(VolumeFailed):
            await gate.admit()

    run(main())


def test_a_stream_that_is_begun_anew_is_no_loss() -> None:
    """V11: a restore ends the stream on this side; clients wait for the next, and only if that
    does not come about the policy holds."""

    async def main() -> None:
        gate = make("fail")
        waiting = asyncio.ensure_future(gate.wait(7, False))
        assert not await settled(waiting)
        gate.lost(renewing=True)
        admitted = asyncio.ensure_future(gate.admit())
        assert gate.shut and not await settled(waiting) and not await settled(admitted)
        gate.opened(7, True)
        gate.moved(7, 7)
        assert await settled(waiting) and await settled(admitted)
        gate.lost(renewing=True)
        admitted = asyncio.ensure_future(gate.admit())
        assert not await settled(admitted)
        gate.lost()
        with pytest.raises(VolumeFailed, match="cannot be reached"):
            await admitted

    run(main())


@pytest.mark.parametrize("resumed", [False, True])
def test_a_remote_that_nobody_has_tried_yet_is_not_lost(resumed: bool) -> None:
    """M17, X7: as it is added, resumed, or the primary started, a client waits for the first
    attempt; only what comes of that is what the policy is for."""

    async def main() -> None:
        gate = make("fail", opened=False)
        if resumed:
            gate.lost()
            gate.excuse(True)
            await gate.admit()
            gate.excuse(False)
        admitted = asyncio.ensure_future(gate.admit())
        assert gate.shut and not await settled(admitted)
        gate.opened(7, True)
        assert await settled(admitted)
        gate = make("fail", opened=False)
        admitted = asyncio.ensure_future(gate.admit())
        assert not await settled(admitted)
        gate.lost()
        with pytest.raises(VolumeFailed, match="cannot be reached"):
            await admitted

    run(main())


def test_continue_does_not_wait_for_the_rest_of_a_resync() -> None:
    """A flush of what was written before the stream would: it is there when the resync has ended.
    The remote counts from then on; with the other policies nothing goes on without it."""

    async def main() -> None:
        gate, told = make(opened=False), list[bool]()
        gate.on_change = told.append
        gate.opened(HEAD, False)
        await gate.wait(HEAD - 1, True)
        gate.moved(HEAD, HEAD)
        assert not gate.engaged
        await gate.wait(HEAD - 1, True)
        gate.completed()
        assert gate.engaged and told == [True]
        await gate.wait(HEAD - 1, True)
        assert not await settled(asyncio.ensure_future(gate.wait(HEAD + 1, False)))
        gate = make("hold", opened=False)
        gate.opened(HEAD, False)
        assert gate.engaged
        assert not await settled(asyncio.ensure_future(gate.wait(HEAD - 1, True)))

    run(main())


def test_one_that_is_away_from_the_start_is_told_of_once() -> None:
    """X4: writes may wait for it from then on."""
    told: list[bool] = []
    gate = make("hold", opened=False)
    gate.on_change = told.append
    gate.lost(renewing=True)
    assert told == []
    gate.lost()
    gate.lost()
    assert told == [False]
    gate.opened(1, True)
    gate.lost()
    gate.lost()
    assert told == [False, True, False]


@pytest.mark.parametrize("policy", ["hold", "fail"])
def test_a_paused_remote_is_waited_for_by_nobody(policy: str) -> None:
    async def main() -> None:
        gate = make(policy, opened=False)
        gate.excuse(True)
        assert not gate.shut
        await gate.wait(9, True)
        gate.excuse(False)
        assert gate.shut

    run(main())


def test_what_a_resync_carries_is_there_when_the_resync_has_ended() -> None:
    """A write from before the stream is in the DCM: the remote's position says nothing of it."""

    async def main() -> None:
        gate = make("hold")
        old = asyncio.ensure_future(gate.wait(7, True))
        assert not await settled(old)
        gate.lost()
        gate.opened(20, False)
        new = asyncio.ensure_future(gate.wait(20, True))
        gate.moved(20, 20)
        assert await settled(new) and not await settled(old)
        gate.completed()
        assert await settled(old)

    run(main())
