"""A log that is partly in memory against a list: what it holds, gives back, and leaves behind."""

from __future__ import annotations

from nbdmirror.engine.log import Log
from tests.property.test_log_model import PATH, Model
from tests.unit.world import run


class SpillModel(Model):
    """As ``Model``; what recovery finds is a prefix, down to what was kept."""

    spilled = crossed = dropped = 0

    async def start(self) -> None:
        await super().start()
        self.threshold = self.rng.choice([4096, 8192, 20480])
        self.spill()

    def spill(self) -> None:
        self.log.spill(self.threshold, self.stand_in)

    async def stand_in(self) -> int:
        """Facets that have it all, at once."""
        return self.log.next_seq - 1

    def append(self) -> None:
        super().append()
        spilled = self.log.spilled
        assert spilled is not None and spilled.memory_bytes <= self.threshold

    async def read(self) -> None:
        spilled = self.log.spilled
        assert spilled is not None
        self.crossed += self.log.ring.tail < spilled.start < self.log.ring.head
        await super().read()

    async def release(self) -> None:
        spilled = self.log.spilled
        assert spilled is not None
        before = spilled.start
        await super().release()
        self.dropped += spilled.start > before

    def recover(self, power: bool) -> None:
        kept, spilled = self.log.kept_seq, self.log.spilled
        assert spilled is not None
        self.spilled += spilled.bytes_spilled
        if power:
            self.disk.power_cut()
        log = Log.open(self.disk, PATH, *self.tail)
        found = [
            r._replace(payload=None if r.payload is None else bytes(r.payload))
            for r in log.scan(self.forks, self.epoch)
        ]
        assert found == self.records[: len(found)], "not a prefix of what was appended"
        end = log.next_seq - 1
        assert end >= kept, "a record that was kept is gone"
        self.losses += end < self.log.next_seq - 1
        self.forks.append((self.epoch, end))
        self.epoch += 1
        self.records = found
        self.log = log

    async def step(self) -> None:
        choice = self.rng.random()
        if choice < 0.5:
            self.append()
        elif choice < 0.65:
            await self.release()
        elif choice < 0.85:
            await self.read()
        elif choice < 0.88:
            await self.log.sync(self.log.next_seq - 1)
        elif choice < 0.94:
            await self.log.keep()
            assert self.log.kept_seq == self.log.next_seq - 1
        elif choice < 0.96:
            await self.through()
        else:
            self.recover(power=choice > 0.98)
            await self.log.sync(self.log.next_seq - 1)
            self.spill()

    async def through(self) -> None:
        """To the file and back, with appends in every state (M11)."""
        self.log.write_through()
        self.append()
        await self.log.keep()
        await self.read()
        self.log.unspill()
        super().append()
        await self.log.sync(self.log.next_seq - 1)
        self.spill()

    async def play(self) -> None:
        await self.start()
        for _ in range(120):
            await self.step()


def test_a_log_partly_in_memory_is_the_list() -> None:
    """M4, O5, O10, I6: memory has its bound, no record is lost that was kept, none is doubled."""
    totals = [0] * 5
    for seed in range(100):
        model = SpillModel(seed)
        try:
            run(model.play())
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        found = (model.wraps, model.losses, model.spilled, model.crossed, model.dropped)
        totals = [one + more for one, more in zip(totals, found, strict=True)]
    assert all(totals), f"wraps, losses, bytes spilled, reads across, drops: {totals}"
