"""Restores, and what was changed beside the log, on a primary (V10, V12, V13)."""

from __future__ import annotations

import asyncio
import errno

import pytest

from nbdmirror.codec import record as codec
from nbdmirror.codec.nbd import ExportInfo
from nbdmirror.codec.nbdhandshake import Forbidden
from nbdmirror.engine.access import Client
from nbdmirror.engine.restorer import Restorer
from nbdmirror.engine.volume import Change
from nbdmirror.errors import DiskFailed, Refused, UsageError, VolumeFailed
from tests.sim.faults import AllLost
from tests.unit.primary import REGION, REGIONS, Primary, cut_at_each, primary
from tests.unit.world import fail, run


def test_a_restore_is_complete_at_once_and_its_copy_survives_any_cut() -> None:
    """V12: reads and writes right away; V10: what was written into the snapshot is restored too;
    and the state before is a snapshot to go back to."""

    async def test(world: Primary) -> None:
        for region in range(6):
            await world.write(region, 1)
        await world.take()
        await world.node.people.export("1", True)
        snapshot = world.served("v@1")
        rest = snapshot.write(
            snapshot, [Change(codec.WRITE, 0, 9 * REGION, 512, b"\6" * 512)], durable=True
        )
        assert rest is not None
        await rest
        for region in (0, 2, 4, 7):
            await world.write(region, 2)
        await world.group.flush()
        before = await world.volume_fills()
        world.disk.stall(20.0)  # the copy cannot have got far
        done = await world.node.people.restore("1", None, False, True, False)
        wanted = [1] * 6 + [0, 0, 0, 6] + [0] * 6
        assert await world.volume_fills() == wanted
        await world.write(2, 5)
        await world.write(12, 5)
        wanted[2] = wanted[12] = 5
        await world.group.flush()
        for cut in (True, True, False, True):
            assert await world.volume_fills() == wanted
            assert (await world.fills(f"v@{done['undo'][:8]}")) == before
            await world.restart(cut=cut)
        while world.node.status()["restore"] is not None:
            await asyncio.sleep(0.1)
        data = world.disk.content("/facets/v")
        assert [data[region * REGION] for region in range(REGIONS)] == wanted
        await world.node.people.restore(done["undo"][:8], None, False, False, False)
        assert await world.volume_fills() == before

    primary(test)


def test_a_restore_that_could_not_begin_begins_when_the_disk_is_mended() -> None:
    """V12: it leaves nothing open that the next one needs."""

    async def test(world: Primary) -> None:
        world.disk.exclusive = True
        await world.write(0, 1)
        await world.take()
        await world.write(0, 2)
        world.disk.faults = fail("pwrite", path="/state/restore/v", number=errno.ENOSPC)
        with pytest.raises(DiskFailed, match="No space left"):
            await world.node.people.restore("1", None, False, True, False)
        world.disk.faults = None
        await world.node.people.restore("1", None, False, True, False)
        assert (await world.volume_fills())[0] == 1

    primary(test)


def test_what_was_written_into_a_snapshot_is_durable_before_it_is_restored() -> None:
    """V10, V12: the client that wrote there has never flushed; what the volume is from then on,
    and may have been sent to a remote, a power cut does not take back."""

    async def test(world: Primary) -> None:
        await world.write(5, 1)
        await world.take()
        await world.node.people.export("1", True)
        snapshot = world.served("v@1")

        async def write(region: int, fill: int) -> None:
            data = bytes([fill]) * REGION
            change = Change(codec.WRITE, 0, region * REGION, REGION, data)
            rest = snapshot.write(snapshot, [change])
            assert rest is not None
            await rest

        await write(5, 6)
        await snapshot.flush()
        await write(5, 7)  # in place
        await write(9, 7)  # a region that only the snapshot has
        world.disk.stall(20.0)  # the copy cannot have got far
        await world.node.people.restore("1", None, False, True, False)
        assert (await world.volume_fills())[4:10] == [0, 7, 0, 0, 0, 7]
        world.disk.power_cut(AllLost())
        await world.start()
        assert (await world.volume_fills())[4:10] == [0, 7, 0, 0, 0, 7]

    primary(test)


def test_while_it_is_restored_only_that_snapshot_takes_no_writes() -> None:
    """V9, V12: who writes into a newer one notices nothing; of that only what it keeps is read."""

    async def test(world: Primary) -> None:
        await world.write(3, 1)
        for number in ("1", "2"):
            await world.take()
            await world.node.people.export(number, True)
        await world.write(3, 2)
        world.disk.stall(20.0)
        await world.node.people.restore("1", None, False, True, False)
        change = Change(codec.WRITE, 0, 3 * REGION, REGION, bytes([8]) * REGION)
        for number in ("1", "2"):
            snapshot = world.served(f"v@{number}")
            rest = snapshot.write(snapshot, [change], durable=True)
            assert rest is not None
            if number == "1":
                with pytest.raises(VolumeFailed, match="being restored"):
                    await rest
            else:
                await rest
        while world.node.status()["restore"] is not None:
            await asyncio.sleep(0.1)
        assert (await world.volume_fills())[3] == 1
        assert (await world.fills("v@2"))[3] == 8

    primary(test)


def test_a_restore_is_old_or_new_after_a_cut_at_any_of_its_operations() -> None:
    """O21, V12: never a mixture, and what was written afterwards and flushed is there."""

    outcomes = set()
    new = [1, 1, 1, 1, 1, 0, 0]

    async def prepare(world: Primary) -> None:
        for region in range(5):
            await world.write(region, 1)
        await world.take()
        for region in range(1, 7):
            await world.write(region, 2)
        await world.group.flush()

    async def restore(world: Primary) -> None:
        await world.node.people.restore("1", None, False, True, False)

    async def check(dead: Primary, nth: int, restored: bool) -> None:
        world = await dead.revived(nth)
        found = await world.volume_fills()
        assert found[:7] in ((new,) if restored else ([1, 2, 2, 2, 2, 2, 2], new)), nth
        outcomes.add(found[1])
        while world.node.status()["restore"] is not None:
            await asyncio.sleep(0.1)
        assert await world.volume_fills() == found
        assert (await world.fills("v@1"))[:7] == new

    run(cut_at_each(range(1, 90, 4), prepare, restore, check, seconds=4.0))
    assert outcomes == {1, 2}


def test_clients_that_are_attached_are_not_surprised() -> None:
    async def test(world: Primary) -> None:
        await world.take()
        await world.write(0, 1)
        world.node.volumes[0].clients += 1
        with pytest.raises(Refused, match="clients are attached to v") as refused:
            await world.node.people.restore("1", None, False, True, False)
        assert "--while-attached" in str(refused.value.hint)
        await world.node.people.restore("1", None, True, True, False)
        with pytest.raises(Refused, match="being"):
            await world.take()
        assert (await world.volume_fills())[0] == 0
        world.node.volumes[0].clients -= 1

    primary(test)


def test_nobody_attaches_what_is_about_to_be_restored() -> None:
    """V12: a client that came between the look at who is attached and the restore would have read
    one half before it and one after; so would two that restore at once."""

    async def test(world: Primary) -> None:
        exports = world.node.exports
        assert exports is not None
        await world.take()
        world.disk.stall(5.0)
        restoring = asyncio.ensure_future(world.node.people.restore("1", "v", False, True, False))
        await asyncio.sleep(1.0)
        found = exports.find_for(Client(), "v")
        assert isinstance(found, Forbidden) and "about to be restored" in found.why
        assert isinstance(exports.find_for(Client(), "w"), ExportInfo)
        with pytest.raises(Refused, match="about to be restored"):
            await world.node.people.restore("1", "v", False, True, False)
        await restoring
        assert isinstance(exports.find_for(Client(), "v"), ExportInfo)

    primary(test)


def test_a_restore_that_begins_while_the_node_stops_is_copied_by_the_next_start() -> None:
    """V12: nothing is copied while files are closed."""

    async def test(world: Primary) -> None:
        await world.write(3, 1)
        await world.take()
        await world.write(3, 2)
        world.disk.stall(5.0)
        restoring = asyncio.ensure_future(world.node.people.restore("1", "v", False, True, False))
        await asyncio.sleep(1.0)
        assert world.node.restorer is not None
        await world.node.restorer.stop()
        await restoring
        await asyncio.sleep(10.0)
        assert world.node.status()["restore"]["done_bytes"] == 0
        await world.restart(cut=False)
        while world.node.status()["restore"] is not None:
            await asyncio.sleep(1.0)
        assert (await world.volume_fills())[3] == 1

    primary(test)


def test_what_remotes_get_of_a_change_no_redo_takes_back_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """V13: the log still has what it had, where a slow disk keeps it from being released."""

    async def test(world: Primary) -> None:
        await world.write(3, 1)
        world.node.volumes[0].facets[0].file.pwrite(3 * REGION, b"\x09" * REGION)
        reached = asyncio.Event()

        async def settle(self: Restorer, seq: int) -> None:
            reached.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(Restorer, "_settle", settle)
        changed = asyncio.ensure_future(
            world.node.people.changed("v", [(3 * REGION, REGION)], None, False)
        )
        await reached.wait()  # remotes read the log again, and the regions
        await world.restart(cut=True)
        changed.cancel()
        assert (await world.volume_fills())[3] == 9

    primary(test)


def test_what_was_changed_behind_the_log_stays_and_snapshots_are_not_spoilt_silently() -> None:
    """V13: no redo brings back what the log had."""

    async def test(world: Primary) -> None:
        await world.write(3, 1)
        await world.write(4, 1)
        world.node.volumes[0].facets[0].file.pwrite(3 * REGION, b"\x09" * REGION)
        await world.node.people.changed("v", [(3 * REGION, REGION)], None, False)
        await world.restart(cut=True)
        assert (await world.volume_fills())[3:5] == [9, 1]
        await world.take()
        with pytest.raises(Refused, match="1 snapshots of v need"):
            await world.node.people.changed("v", [(3 * REGION, 1)], None, False)
        await world.node.people.changed("v", [(3 * REGION, 1)], None, True)
        assert world.states() == ["lost"]
        with pytest.raises(UsageError, match="not within"):
            await world.node.people.changed("v", [(REGIONS * REGION, 1)], None, False)

    primary(test)
