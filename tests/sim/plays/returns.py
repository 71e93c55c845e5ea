"""Plays of a local facet's way back, with something that comes between (M12, O16, I2, I3, I5)."""

from __future__ import annotations

import asyncio

from nbdmirror.engine.log import RING_AT
from tests.sim.directed import directed
from tests.sim.faults import Fault, Injector, Kind
from tests.sim.options import KIB
from tests.sim.oracle import Violation
from tests.sim.plays.stage import (
    SLOW,
    SLOW_SECONDS,
    either,
    full_log,
    strikes,
    within,
    without_facet,
)
from tests.sim.script import BLOCK, POLL_S, SYNC_SECONDS, Script

NO_SPACE = 28


def _full(path: str) -> Injector:
    """What is written there finds no space, what was written is synced."""

    def inject(operation: str, where: str, nth: int) -> Fault | None:
        wanted = operation in ("pwrite", "open") and where == path
        return Fault(Kind.ERROR, NO_SPACE) if wanted else None

    return inject


async def _written_in_the_last_sync(s: Script) -> None:
    """All is copied to a facet, and the sync before it is trusted under way, as a client's write to
    it fails: the other facet has that, and the log goes on without it. It is not trusted."""
    a, path = s.world.a, "/facets/v0.1"
    await s.write(0, 0, count=BLOCK)
    await s.facet("offline", path)
    await s.write(0, 0, count=BLOCK)
    await full_log(s)
    facets, began = (await s.primary()).facets, asyncio.Event()
    assert facets is not None
    member = facets.member(path)

    def copied() -> bool:
        marked = member.dcm.map.count if member.dcm is not None else 1
        return member.copy is not None and not marked and not member.copy._copied

    a.disk.faults = strikes("sync", path, SLOW, began, copied)
    await s.facet("online", path)
    await began.wait()
    a.disk.faults = _full(path)
    await s.write(0, BLOCK)
    await asyncio.sleep(SLOW_SECONDS)
    await full_log(s)
    await s.stop(a)
    a.disk.faults = None
    await s.world.start(a)
    await s.facets_back()
    await s.in_sync()


async def _written_in_the_sync_of_redo(s: Script) -> None:
    """The same of a volume's last facet, which comes back from the log, for a remote stands in."""
    a, path = s.world.a, "/facets/v0.0"
    await s.write(0, 0, count=BLOCK)
    await without_facet(s)
    await s.write(0, 0, BLOCK, 2 * BLOCK, count=BLOCK)
    (facet,) = (await s.primary()).volumes[0].facets
    began = asyncio.Event()
    a.disk.faults = strikes("sync", path, SLOW, began, lambda: facet.writable)
    s.mend(path)
    await began.wait()
    a.disk.faults = _full(path)
    await s.write(0, BLOCK, fua=True)
    await asyncio.sleep(SLOW_SECONDS)
    await full_log(s)
    await s.in_sync()
    await s.stop(a)
    a.disk.faults = None
    await s.world.start(a)
    await s.read(0, 0, 2 * BLOCK)
    await s.facets_back()
    await s.in_sync()


async def _owed_and_killed(s: Script) -> None:
    """A log in memory goes to disk, for the other volume's last facet is lost; the sync of a facet
    before that fails. What this one lacks has left the log, and the process dies before it is in
    the facet's map."""
    a, path = s.world.a, "/facets/v0.1"
    node = await s.primary()
    assert node.facets is not None
    s.spoil("/facets/v1.0")
    await s.write(1, 0)
    await s.until(lambda node: len(node.volumes[1].in_service()) == 1)
    await s.world.in_life(a, node.facets.member("/facets/v1.0").to_map())
    await s.write(0, 0, BLOCK, 2 * BLOCK, count=BLOCK)
    await s.in_sync()
    while node.log.ring.tail_seq != node.log.next_seq:
        node.housekeeper.kick()
        await asyncio.sleep(POLL_S)
    marking = asyncio.Event()
    lost = strikes("sync", path, Fault(Kind.LOSE), asyncio.Event())
    a.disk.faults = either(lost, strikes("sync", "/state/dcm/@", SLOW, marking))
    s.spoil("/facets/v1.1")
    s.world.spawn(s.write(1, BLOCK))
    await within(marking, SYNC_SECONDS)
    s.kill(a)
    a.disk.faults = None
    for other in ("/facets/v1.0", "/facets/v1.1"):
        s.mend(other)
    await s.world.start(a)
    await s.facets_back()
    await s.in_sync()


async def _rot_in_what_it_lacks(s: Script) -> None:
    """A record that a volume's last facet lacks has rotted in the log, and a remote has it: the
    facet comes back by a copy."""
    a = s.world.a
    await without_facet(s)
    log = (await s.primary()).log
    at = RING_AT + log.ring.head % log.capacity
    await s.write(0, BLOCK, 2 * BLOCK, 3 * BLOCK, count=BLOCK)
    await s.in_sync()
    log._recent.clear()
    log._recent_seqs.clear()
    log._recent_bytes = 0
    a.disk.flip("/state/log", at + 200)
    s.mend("/facets/v0.0")
    try:
        async with asyncio.timeout(SYNC_SECONDS):
            await s.facets_back()
    except TimeoutError:
        raise Violation("a rotten record keeps a facet out, though a remote has all (I2)") from None
    await s.in_sync()


async def _read_while_out(s: Script) -> None:
    """A read of one of two facets is under way when that fails, having lost a write; its disk gives
    the pages then, and the answer once the facet is back: it is none (O16)."""
    a, path = s.world.a, "/facets/v0.0"
    await s.write(0, 0, count=BLOCK)
    await s.in_sync()
    node = await s.primary()
    await s.world.in_life(a, node.housekeeper.sync_facets())
    await s.write(0, 0, count=BLOCK)
    facet, other = node.volumes[0].facets
    file = facet.file
    lost, back = asyncio.Event(), asyncio.Event()

    async def read(offset: int, length: int) -> bytes:
        await lost.wait()
        data = bytes(file._inode.cache.read(offset, length))  # type: ignore[attr-defined]
        await back.wait()
        return data

    setattr(file, "read", read)  # noqa: B010
    setattr(facet, "try_pread", lambda offset, length: None)  # noqa: B010
    other.outstanding += 5  # it is busy
    reading = s.world.spawn(s.read(0, 0, BLOCK))
    await asyncio.sleep(POLL_S)
    a.disk.faults = strikes("sync", path, Fault(Kind.LOSE), asyncio.Event())
    await s.world.in_life(a, node.housekeeper.sync_facets())
    lost.set()
    await asyncio.sleep(POLL_S)
    await s.facet("online", path)
    await s.until(lambda node: facet.in_service)
    back.set()
    await reading
    other.outstanding -= 5
    await s.in_sync()


WRITTEN_IN_THE_LAST_SYNC = directed(_written_in_the_last_sync, facets=2)
WRITTEN_IN_THE_SYNC_OF_REDO = directed(_written_in_the_sync_of_redo, last_facet=True)
OWED_AND_KILLED = directed(_owed_and_killed, spill=8 * KIB, facets=2)
ROT_IN_WHAT_IT_LACKS = directed(_rot_in_what_it_lacks, last_facet=True)
READ_WHILE_OUT = directed(_read_while_out, facets=2)
