"""Plays of a session between a primary and a remote: what it must live through, and what is said of
it when it does not (I8, X4)."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from nbdmirror.codec import record as codec
from nbdmirror.codec import repl
from nbdmirror.codec.repl import Frame, Type
from nbdmirror.config import FRAME_BYTES_MIN, MIB
from nbdmirror.engine.batch import Changes
from nbdmirror.engine.resync import Resync
from nbdmirror.engine.session import FRAME_BYTES
from nbdmirror.engine.volume import Change
from tests.sim.directed import directed
from tests.sim.faults import Fault, Kind
from tests.sim.options import KIB
from tests.sim.oracle import Violation
from tests.sim.plays.stage import all_is_there, follower, full_log, moment, only_remote, within
from tests.sim.script import BLOCK, POLL_S, SYNC_SECONDS, Script

PIECE = 256 * KIB
PIECES = 20


async def _large_batch(s: Script) -> None:
    """More comes in one batch than a frame may hold, to extents that are active already (the writes
    of a client that said goodbye and has gone): it is sent."""
    node = await s.primary()
    assert node.primary is not None
    group, data = node.primary.group, memoryview(bytes(PIECE))
    changes = [Change(codec.WRITE, 0, at * PIECE, PIECE, data) for at in range(PIECES)]

    async def write() -> None:
        rest = group.write_batch(node.volumes[0], Changes(changes))
        if rest is not None:
            await rest

    await s.world.in_life(s.world.a, write())
    await s.in_sync()
    s.link(up=False)
    await s.world.in_life(s.world.a, write())
    if max(chunk.size for chunk in node.log._recent.values()) > FRAME_BYTES_MIN - FRAME_BYTES:
        raise Violation("what one client wrote is too long for a frame: nothing is sent (I8)")
    s.link(up=True)
    await s.in_sync()


async def _pinged(s: Script) -> None:
    """The state's disk takes longer to save what a handshake came to than the remote is patient
    between two signs of life: the session begins all the same."""
    (b,) = s.world.remotes
    await s.in_sync()
    node = await s.primary()
    assert node.primary is not None
    for tuning in (node.primary._context.tuning, follower(b).tuning):
        object.__setattr__(tuning, "heartbeat_seconds", 0.2)

    def slow(operation: str, path: str, nth: int) -> Fault | None:
        wanted = operation == "sync" and path.startswith("/state/superblock")
        return Fault(Kind.STALL, seconds=2.0) if wanted else None

    s.world.a.disk.faults = slow
    s.world.net.reset("a", "b")
    await s.write(0, 0)
    try:
        async with asyncio.timeout(SYNC_SECONDS):
            await s.until(all_is_there)
    except TimeoutError:
        raise Violation("signs of life end the handshake (X4)") from None
    s.world.a.disk.faults = None
    await s.in_sync()


async def _garbled(s: Script) -> None:
    """A frame arrives garbled, once: the session begins anew, and nobody is told to do anything."""
    (b,) = s.world.remotes
    await s.write(0, 0)
    await s.in_sync()
    current, again = follower(b).current, moment(s, s.world.a, "connected")
    assert current is not None and current.link._transport is not None
    frame = b"".join(repl.encode(Type.ACK, current.link.session, [bytes(24)]))
    current.link._transport.write(frame[:-1] + b"\1")
    await again.wait()
    await s.write(0, BLOCK)
    await s.in_sync()
    status = (await only_remote(s)).status(0.0, 0)
    if status["next_action"] is not None or status["why"] is not None:
        raise Violation(f"a garbled frame leaves: {status['why']} {status['next_action']} (X4)")


async def _small_log(s: Script) -> None:
    """A remote's log is too small for the primary's largest records: that is what people read."""
    (b,) = s.world.remotes
    await s.in_sync()
    refused = moment(s, s.world.a, "refused")
    await s.write(0, 0, count=4 * BLOCK, fua=True)
    await within(refused, SYNC_SECONDS)
    if "larger log.size" not in str((await only_remote(s)).refused):
        raise Violation("nobody is told that a remote's log is too small (X4)")
    await s.stop(b)
    b.config = replace(b.config, log=replace(b.config.log, size=260 * KIB))
    await s.world.replace(b)
    await s.world.start(b)
    await s.in_sync()


async def _overflowed_as_it_ends(s: Script) -> None:
    """A remote confirms the end of a resync in the step in which its place in the log is given up:
    its map is in use, so it is not consistent (O12)."""
    remote, original, came = await only_remote(s), Resync.on_frame, asyncio.Event()

    def on_frame(self: Resync, frame: Frame) -> None:
        if frame.type is not Type.CONSISTENT or came.is_set():
            original(self, frame)
            return
        came.set()
        s.world.spawn(remote.overflow("as it ends"))
        asyncio.get_running_loop().call_soon(original, self, frame)

    setattr(Resync, "on_frame", on_frame)  # noqa: B010
    try:
        await s.in_sync()
        s.link(up=False)
        await full_log(s)
        s.link(up=True)
        await came.wait()
        await asyncio.sleep(POLL_S)
        if remote.tracking and remote.facts["consistent"]:
            raise Violation("a remote is consistent, and its map in use (O12)")
    finally:
        setattr(Resync, "on_frame", original)  # noqa: B010
    await s.in_sync()


LARGE_BATCH = directed(
    _large_batch,
    sizes=(8 * MIB, 32 * KIB),
    log_size=32 * MIB,
    remote_log_size=32 * MIB,
    constants={},
    extent=MIB,
    region=64 * KIB,
)
PINGED = directed(_pinged)
GARBLED = directed(_garbled)
OVERFLOWED_AS_IT_ENDS = directed(_overflowed_as_it_ends)
SMALL_LOG = directed(_small_log, log_size=260 * KIB)
