"""The log against a list: appends, wraps, releases, readers near and far, kills and power cuts."""

from __future__ import annotations

import asyncio
import random

from nbdmirror.codec import record as codec
from nbdmirror.codec.record import Record
from nbdmirror.engine.log import RING_AT, Cursor, Log
from nbdmirror.ports import Buffer
from tests.unit.world import STATE, make_disk, run

PATH = f"{STATE}/log"


class Model:
    """A log on a simulated disk, and the list of what it should hold."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.disk = make_disk(seed)
        self.capacity = self.rng.choice([8192, 16384, 65536])
        self.records: list[Record] = []
        self.epoch = 1
        self.forks: list[tuple[int, int]] = []
        self.tail = (0, 1)
        """As in the superblock: durable."""
        self.wraps = self.losses = 0

    async def start(self) -> None:
        await Log.create(self.disk, PATH, RING_AT + self.capacity)
        await self.disk.sync_directory(STATE)
        self.log = Log.open(self.disk, PATH, *self.tail)

    def append(self) -> None:
        rng, log = self.rng, self.log
        batch: list[Record] = []
        for seq in range(log.next_seq, log.next_seq + rng.choice([1, 1, 2, 5])):
            length = rng.choice([0, 1, 64, 500, 512, 1000])
            kind = rng.choice([codec.WRITE, codec.WRITE, codec.TRIM])
            payload = rng.randbytes(length) if kind == codec.WRITE else None
            batch.append(Record(kind, 0, self.epoch, 0, seq, 0, length, 0, payload))
        sizes = [codec.stored_size(r.kind, r.length) for r in batch]
        if not log.fits(sum(sizes), max(sizes)):
            return
        parts: list[Buffer] = [part for r in batch for part in codec.encode(r)]
        before = log.ring.head // self.capacity
        log.append(parts, sum(sizes), len(batch))
        self.wraps += log.ring.head // self.capacity > before
        self.records += batch

    async def release(self) -> None:
        log = self.log
        seq = self.rng.randint(log.ring.tail_seq, log.next_seq)
        position = await log.position_of(seq)
        log.release(seq, position)
        self.tail = (position, seq)
        log.confirm_tail(position)
        self.records = [r for r in self.records if r.seq >= seq]

    async def read(self) -> None:
        log, rng = self.log, self.rng
        if log.ring.tail_seq == log.next_seq:
            return
        if rng.random() < 0.5:
            for seq in rng.sample(sorted(log._recent), rng.randint(0, len(log._recent))):
                del log._recent[seq]
        first = rng.randrange(log.ring.tail_seq, log.next_seq)
        cursor, found = Cursor(first), []
        size_max = rng.choice([64, 600, 4096, 1 << 18])
        while cursor.seq < log.next_seq:
            found += (await log.read(cursor, size_max)).parsed()
        assert found == [r for r in self.records if r.seq >= first]

    def recover(self, power: bool) -> None:
        durable = self.log.durable_seq
        if power:
            self.disk.power_cut()
        log = Log.open(self.disk, PATH, *self.tail)
        found = [
            r._replace(payload=None if r.payload is None else bytes(r.payload))
            for r in log.scan(self.forks, self.epoch)
        ]
        assert found == self.records[: len(found)], "not a prefix of what was appended"
        end = log.next_seq - 1
        if power:
            assert end >= durable, "a durable record is gone"
            self.losses += len(found) < len(self.records)
            self.forks.append((self.epoch, end))
        else:
            assert found == self.records, "the page cache lost something"
        self.epoch += 1
        self.records = found
        self.log = log

    async def play(self) -> None:
        await self.start()
        for _ in range(120):
            choice = self.rng.random()
            if choice < 0.5:
                self.append()
            elif choice < 0.65:
                await self.release()
            elif choice < 0.85:
                await self.read()
            elif choice < 0.92:
                await self.log.sync(self.log.next_seq - 1)
            elif choice < 0.94:
                self.recover(power=False)
                await self.log.sync(self.log.next_seq - 1)
            elif choice < 0.97:
                syncing = asyncio.ensure_future(self.log.sync(self.log.next_seq - 1))
                self.append()
                await syncing
            else:
                self.recover(power=True)
                await self.log.sync(self.log.next_seq - 1)


def test_the_log_is_the_list() -> None:
    """V2, O5, O10, O15, faults 2, 3, 5."""
    wraps = losses = 0
    for seed in range(250):
        model = Model(seed)
        try:
            run(model.play())
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        wraps += model.wraps
        losses += model.losses
    assert wraps > 100 and losses > 100, (wraps, losses)
