"""A log on a simulated disk: made, appended to, read, opened anew."""

from __future__ import annotations

from nbdmirror.codec import record as codec
from nbdmirror.codec.record import Record
from nbdmirror.engine.log import RING_AT, Cursor, Log
from nbdmirror.ports import Buffer
from tests.sim.disk import SimDisk
from tests.unit.world import STATE

PATH = f"{STATE}/log"
CAPACITY = 64 << 10


async def make(disk: SimDisk, capacity: int = CAPACITY) -> Log:
    await Log.create(disk, PATH, RING_AT + capacity)
    await disk.sync_directory(STATE)
    return Log.open(disk, PATH, 0, 1)


def record(seq: int, length: int, epoch: int = 1) -> Record:
    return Record(codec.WRITE, 0, epoch, 0, seq, 0, length, seq, bytes([seq % 256]) * length)


def append(log: Log, lengths: list[int], epoch: int = 1) -> list[Record]:
    records = [record(log.next_seq + n, length, epoch) for n, length in enumerate(lengths)]
    parts: list[Buffer] = [part for r in records for part in codec.encode(r)]
    sizes = [codec.stored_size(codec.WRITE, length) for length in lengths]
    assert log.fits(sum(sizes), max(sizes))
    log.append(parts, sum(sizes), len(records))
    return records


async def release(log: Log, seq: int) -> None:
    position = await log.position_of(seq)
    log.release(seq, position)
    log.confirm_tail(position)


async def read_all(log: Log, cursor: Cursor, size_max: int = 1 << 16) -> list[Record]:
    found: list[Record] = []
    while cursor.seq < log.next_seq:
        found += (await log.read(cursor, size_max)).parsed()
    return found


def reopened(
    disk: SimDisk, tail: tuple[int, int], epoch: int = 9, forks: list[tuple[int, int]] | None = None
) -> tuple[Log, list[Record]]:
    log = Log.open(disk, PATH, *tail)
    found = [r._replace(payload=bytes(r.payload or b"")) for r in log.scan(forks or [], epoch)]
    return log, found
