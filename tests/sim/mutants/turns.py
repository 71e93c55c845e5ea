"""What is played of two who work in turns: what one does in the middle of the other's work
(secondaries, snapshots; see ``plays``). Each step is right by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nbdmirror.engine.node import Node
from tests.sim.directed import directed
from tests.sim.faults import AllLost, Fault, Injector, Kind, Timing
from tests.sim.host import Host
from tests.sim.mutants.plays import FAR, _all_is_there, _cleared, strikes
from tests.sim.options import KIB
from tests.sim.oracle import Violation, compare
from tests.sim.script import BLOCK, OPTIONS, POLL_S, Script

SLOW_SECONDS = 2.0
DELAY_SECONDS = 0.2
SLOW = Fault(Kind.STALL, seconds=SLOW_SECONDS)


def _saves(host: Host, wanted: Callable[[Node], bool], struck: Callable[[], None]) -> Injector:
    """The first save of the superblock in which what is ``wanted`` is so is slow."""
    left = [SLOW]

    def inject(operation: str, path: str, nth: int) -> Fault | None:
        node = host.node
        if operation != "sync" or not path.startswith("/state/superblock") or node is None:
            return None
        if not left or not wanted(node):
            return None
        struck()
        return left.pop()

    return inject


async def _moving(s: Script) -> Host:
    """A delayed secondary, as the bound of what it may apply moves: that is being saved."""
    (b,) = s.world.remotes
    assert b.node is not None and b.node.secondary is not None
    await s.world.in_life(b, b.node.secondary.applier.change(delay=DELAY_SECONDS))
    moving = asyncio.Event()

    def moves(node: Node) -> bool:
        assert node.secondary is not None
        applier = node.secondary.applier
        return bool(applier.settings["limit"] > applier.applied_seq)

    b.disk.faults = _saves(b, moves, moving.set)
    await s.write(0, 0, BLOCK, count=BLOCK)
    await moving.wait()
    return b


async def _moved_and_stopped(s: Script) -> None:
    """It is stopped in that moment: its next start redoes nothing, and is not to take for applied
    what is not."""
    b = await _moving(s)
    await s.stop(b)
    await s.world.start(b)
    await s.in_sync()


async def _moved_and_frozen(s: Script) -> None:
    """Somebody freezes it in that moment: from then on nothing is applied, a power loss or not."""
    b = await _moving(s)
    await s.freeze(on=True)
    await asyncio.sleep(SLOW_SECONDS)
    assert b.node is not None and b.node.secondary is not None
    applier = b.node.secondary.applier
    if applier.applied_seq > applier.settings["limit"]:
        raise Violation(
            "what is applied is beyond the bound, which a power loss comes back to (V8)"
        )
    await s.freeze(on=False)
    await s.in_sync()


async def _thawed_and_failed(s: Script) -> None:
    """Somebody thaws a secondary, and that cannot be saved: nothing is applied by it, for the next
    start may find it frozen where it was."""
    (b,) = s.world.remotes
    await s.freeze(on=True)
    await s.write(0, 0, FAR, count=BLOCK)
    await s.until(_all_is_there)
    b.disk.faults = strikes("sync", "/state/superblock", Fault(Kind.LOSE), _nothing)
    await s.freeze(on=False)
    await s.up(b)
    assert b.node is not None and b.node.secondary is not None
    applier, epoch = b.node.secondary.applier, b.node.store.state["epoch"]
    if applier.bounded:
        wanted = s.world.history.image(epoch, applier.applied_seq)
        compare(b.images(), wanted, "a secondary that is frozen (I1, V8)")
    await s.freeze(on=False)
    await s.in_sync()


async def _synced_before(s: Script) -> None:
    """A facet of the secondary is being synced when the primary, which has lost its power and what
    the secondary has, begins a stream of lower numbers: that sync says nothing of these."""
    world = s.world
    (b,) = world.remotes
    await s.write(0, 0, fua=True)
    await s.in_sync()
    world.a.disk.faults = strikes("sync", "/state/log", Fault(Kind.STALL, seconds=60.0), _nothing)
    syncing = asyncio.Event()
    for _ in range(BLOCK):
        await s.write(0, 0)
    await s.until(_all_is_there)
    b.disk.faults = strikes("sync", "/facets/v0", SLOW, syncing.set)
    await syncing.wait()
    s.link(up=False)
    world.power_cut(world.a, AllLost())
    world.a.disk.faults = None
    await world.start(world.a)
    s.link(up=True)
    await s.in_sync()
    await asyncio.sleep(SLOW_SECONDS)
    await s.write(0, FAR, fua=True)
    await s.in_sync()
    assert b.node is not None
    while b.node.log.ring.durable_tail < b.node.log.ring.head:
        await asyncio.sleep(POLL_S)
    world.power_cut(b, AllLost())
    await world.start(b)
    await s.write(1, 0)
    await s.in_sync()


def _nothing() -> None:
    return None


async def _consistent_and_back(s: Script) -> None:
    """A secondary is making durable that it is consistent when its link is lost, for so long that
    there is a resync to come: the image from before that stays until it is through."""
    (b,) = s.world.remotes
    saving = asyncio.Event()
    seen: list[bool] = []

    def consistent_again(node: Node) -> bool:
        consistent = bool(node.store.state["upstream"]["consistent"])
        if not consistent:
            seen.append(True)
        return consistent and bool(seen)

    await _cleared(s)
    await s.freeze(on=True)  # the end of the resync comes before what it waits for is applied
    s.link(up=True)
    assert b.node is not None and b.node.secondary is not None
    while (receiver := b.node.secondary.current) is None or receiver._end_seq is None:
        await s.write(0, FAR)
    b.disk.faults = _saves(b, consistent_again, saving.set)
    await s.freeze(on=False)
    await saving.wait()
    s.link(up=False)
    for turn in range(13):  # until the log is full
        await s.write(1, turn % 4 * BLOCK, count=BLOCK, pause=0.02)
    s.link(up=True)
    while b.node.store.state["upstream"]["consistent"]:
        await asyncio.sleep(0.000_1)
    s.link(up=False)
    await asyncio.sleep(SLOW_SECONDS)
    s.world.album.check_image(b, b.node)
    s.link(up=True)
    await s.in_sync()


async def _deleted_while_kept(s: Script) -> None:
    """The newest snapshot is deleted while a region is being read for it, which a write waits for:
    the others stay."""
    await s.write(0, 0, count=BLOCK)
    first = await s.snapshot()
    second = await s.snapshot()
    reading = asyncio.Event()
    s.world.a.disk.faults = strikes("read", "/facets/v0", SLOW, reading.set)
    s.world.spawn(s.write(0, 0))
    await reading.wait()
    await s.delete(second)
    await asyncio.sleep(2 * SLOW_SECONDS)
    await _are_there(s, first)


async def _given_up_while_deleted(s: Script) -> None:
    """The space for snapshots ends while one is deleted, and what the one before it needs is on its
    way there: only that one is given up, the others stay."""
    await s.write(0, *range(0, 5 * BLOCK, BLOCK), count=BLOCK)
    await s.snapshot()
    second = await s.snapshot()
    await s.write(0, 0, BLOCK)
    third = await s.snapshot()
    moving = asyncio.Event()
    s.world.a.disk.faults = strikes("read", f"/state/snapshots/{second}", SLOW, moving.set)
    s.world.spawn(s.delete(second))
    await moving.wait()
    await s.write(0, 2 * BLOCK, 3 * BLOCK, 4 * BLOCK)
    await asyncio.sleep(2 * SLOW_SECONDS)
    await _are_there(s, third)


async def _are_there(s: Script, *uuids: str) -> None:
    """Nothing has happened that any of these could be lost by."""
    node = await s.primary()
    for uuid in uuids:
        entry = node.snapshots.entry(uuid)
        if entry is None or not node.snapshots.shown(entry):
            why = None if entry is None else entry.get("lost")
            raise Violation(f"a snapshot is lost for no reason: {why} (V9)")


MISSES = Timing(sync=(0.000_1, 0.002), miss=1.0)
MOVED_AND_STOPPED = directed(_moved_and_stopped)
MOVED_AND_FROZEN = directed(_moved_and_frozen)
THAWED_AND_FAILED = directed(_thawed_and_failed)
SYNCED_BEFORE = directed(_synced_before)
CONSISTENT_AND_BACK = directed(_consistent_and_back)
DELETED_WHILE_KEPT = directed(_deleted_while_kept, timing=MISSES)
GIVEN_UP_WHILE_DELETED = directed(
    _given_up_while_deleted, timing=MISSES, snapshot_space=4 * OPTIONS.region
)
assert OPTIONS.region == 4 * KIB
