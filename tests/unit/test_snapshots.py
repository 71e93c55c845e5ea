"""Snapshots of a primary: taken, read, written into, compared, merged, given up (V9, V10, O21)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nbdmirror.codec import record as codec
from nbdmirror.config import SnapshotConfig
from nbdmirror.engine.layerfiles import OWN
from nbdmirror.engine.volume import Change
from nbdmirror.errors import Refused, UsageError, VolumeFailed
from tests.sim.faults import Fault, Kind
from tests.unit.primary import REGION, REGIONS, Primary, cut_at_each, primary
from tests.unit.world import run


def test_a_snapshot_keeps_what_the_volume_overwrites_across_a_power_cut() -> None:
    """V9, O21; parts of regions and clearings too."""

    async def test(world: Primary) -> None:
        for region in range(4):
            await world.write(region, region + 1)
        await world.take()
        await world.write(1, 90, length=512)
        await world.group.clear(
            world.node.volumes[0], Change(codec.TRIM, 0, 2 * REGION, 2 * REGION, None)
        )
        await world.write(8, 91)
        for cut in (False, False, True):
            assert await world.fills("v@1") == [1, 2, 3, 4] + [0] * 12
            await world.restart(cut=cut)

    primary(test)


@pytest.mark.parametrize("cut", [True, False])
def test_one_whose_taking_is_cancelled_keeps_what_it_needs_or_is_gone(cut: bool) -> None:
    """O21: what a session of a secondary takes ends with it, perhaps in the middle of the save."""

    async def test(world: Primary) -> None:
        await world.write(0, 1)
        snapshots, seq = world.node.snapshots, world.node.log.next_seq - 1
        taking = asyncio.ensure_future(snapshots.take_here("restore", [0], seq, 0, protected=False))
        while not snapshots.entries:
            await asyncio.sleep(0.000_01)
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
        uuid = snapshots.entries[0]["uuid"]
        await world.write(0, 2)
        await world.group.flush()
        for _ in range(2):
            for entry in world.node.snapshots.entries:
                data = await world.node.snapshots.chains[0].read(uuid, 0, REGION)
                assert entry["uuid"] == uuid and data[0] == 1
            await world.restart(cut=cut)

    primary(test)


def test_one_that_is_being_taken_is_not_in_the_list_yet() -> None:
    """X4: nor does it keep the others from being listed."""

    async def test(world: Primary) -> None:
        await world.take()
        taking = asyncio.ensure_future(world.take())
        while len(world.node.snapshots.entries) < 2:
            await asyncio.sleep(0.000_01)
        assert len(world.node.people.list()) == len(world.node.people.brief()) == 1
        await taking
        assert len(world.node.people.list()) == len(world.node.people.brief()) == 2

    primary(test)


def test_one_write_copies_once_however_many_snapshots_there_are() -> None:
    """The chain."""

    async def test(world: Primary) -> None:
        await world.write(0, 1)
        for _ in range(5):
            await world.take()
        await world.write(0, 2)
        await world.write(0, 3)
        kept = [found["kept"]["regions"] for found in world.node.people.list()]
        assert kept == [0, 0, 0, 0, 1]
        assert [found["changed"]["regions"] for found in world.node.people.list()] == [1] * 5
        for number in range(1, 6):
            assert (await world.fills(f"v@{number}"))[0] == 1

    primary(test)


def test_a_write_with_a_snapshot_costs_one_sync_and_only_the_first_time() -> None:
    """The bar: at most one disk sync is added to any request; later ones add none."""

    async def test(world: Primary) -> None:
        await world.write(0, 1)
        await world.take()
        syncs: list[str] = []

        def count(operation: str, path: str, nth: int) -> Fault | None:
            if operation == "sync":
                syncs.append(path)
            return None

        world.disk.faults = count
        await asyncio.gather(*(world.write(region, 2) for region in range(8)))
        assert len(syncs) <= 2, "a batch under way, and one for all who came meanwhile"
        syncs.clear()
        await asyncio.gather(*(world.write(region, 3) for region in range(8)))
        assert not syncs

    primary(test)


def test_a_copy_on_write_does_not_hold_up_other_regions() -> None:
    async def test(world: Primary) -> None:
        for region in (0, 1):
            await world.write(region, 1)
        await world.take()
        await world.write(1, 2)
        world.disk.stall(30.0)
        waiting = asyncio.ensure_future(world.write(0, 2))
        await asyncio.sleep(0)
        change = Change(codec.WRITE, 0, REGION, REGION, bytes(REGION))
        assert world.group.write(world.node.volumes[0], [change]) is None, "it had to wait"
        assert not waiting.done()
        await waiting

    primary(test)


def test_a_group_snapshot_is_of_all_volumes_at_one_record() -> None:
    async def test(world: Primary) -> None:
        await world.write(0, 1, volume=0)
        await world.write(0, 2, volume=1)
        await world.take(None)
        await world.write(0, 3, volume=0)
        await world.write(0, 4, volume=1)
        assert (await world.fills("v@1"))[0] == 1
        assert (await world.fills("w@1"))[0] == 2
        (found,) = world.node.people.list()
        assert found["seq"] == 3 and found["volumes"] == ["v", "w"]

    primary(test)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_deleting_merges(victim: int) -> None:
    """The others stay what they are, across a power cut."""

    async def test(world: Primary) -> None:
        names = []
        for value in (1, 2, 3):
            for region in range(value, 12, value):
                await world.write(region, value)
            names.append(await world.take())
        for region in range(0, 12, 5):
            await world.write(region, 9)
        wanted = {name: await world.fills(f"v@{name}") for name in names}
        await world.node.people.delete(names[victim], False)
        del wanted[names[victim]]
        for cut in (False, True):
            assert {name: await world.fills(f"v@{name}") for name in wanted} == wanted
            await world.restart(cut=cut)
        assert len(world.disk.list("/state/snapshots")) == 2

    primary(test)


def test_a_snapshot_shows_its_holes_and_looks_at_no_more_than_asked() -> None:
    """Of what is kept, of its own, and of the volume below; BLOCK_STATUS has bounded work."""

    async def test(world: Primary) -> None:
        await world.write(1, 1)
        await world.write(2, 2)
        await world.write(5, 3)
        number = await world.take()
        await world.write(2, 9)
        await world.write(9, 9)  # what was a hole is kept as one
        later = await world.take()
        await world.write(1, 8)
        await world.group.clear(
            world.node.volumes[0], Change(codec.TRIM, 0, 5 * REGION, REGION, None)
        )
        for name in (number, later):
            snapshot = world.served(f"v@{name}")
            data = await snapshot.read(0, REGIONS * REGION)
            shown = snapshot.allocation(512, REGIONS * REGION - 512)
            at = 512
            for start, length, hole in shown:
                assert start == at and hole != any(data[start : start + length])
                at += length
            assert at == REGIONS * REGION
            assert [hole for _, _, hole in shown[1:]] == [not hole for _, _, hole in shown[:-1]]
            for limit in range(1, 6):
                few = snapshot.pieces(512, REGIONS * REGION - 512, limit)
                assert 0 < len(few) <= limit and few[:-1] == shown[: len(few) - 1]
                assert few[-1][1] <= shown[len(few) - 1][1]

    primary(test)


def test_diff_names_what_changed_between_two_and_until_now() -> None:
    async def test(world: Primary) -> None:
        await world.take()
        await world.write(1, 1)
        await world.write(2, 1)
        await world.take()
        await world.write(7, 1)

        def ranges(*ends: str) -> list[tuple[int, int]]:
            found = world.node.people.diff(ends[0], ends[1] if ends[1:] else None, "v")
            return [(r["offset"] // REGION, r["length"] // REGION) for r in found["ranges"]]

        assert ranges("1", "2") == ranges("2", "1") == [(1, 2)]
        assert ranges("2") == [(7, 1)]
        assert ranges("1") == [(1, 2), (7, 1)]

    primary(test)


def test_a_writable_snapshot_has_its_own_map_and_leaves_the_volume_alone() -> None:
    """V9: both maps; what is written survives a power cut after a flush."""

    async def test(world: Primary) -> None:
        for region in range(3):
            await world.write(region, 1)
        await world.take()
        await world.take()
        assert world.node.exports is not None

        def read_only() -> bool:
            assert world.node.exports is not None
            (found,) = [i for i in world.node.exports.exports() if i.name == name]
            return found.read_only

        name = "v@1"
        assert read_only()
        await world.node.people.export("1", True)
        assert not read_only()
        snapshot = world.served(name)
        change = Change(codec.WRITE, 0, REGION + 512, REGION, b"\7" * REGION)
        rest = snapshot.write(snapshot, [change])
        assert rest is not None
        await rest
        await snapshot.clear(snapshot, Change(codec.ZERO, 0, 0, REGION, None))
        await snapshot.flush()
        await world.write(1, 5)
        for cut in (False, True):
            data = bytes(await world.served(name).read(0, 3 * REGION))
            assert data[:REGION] == bytes(REGION)
            assert data[REGION : REGION + 512] == b"\1" * 512
            assert data[REGION + 512 : 2 * REGION + 512] == b"\7" * REGION
            assert (await world.fills("v@2"))[:3] == [1, 1, 1]
            first = world.node.people.list()[0]
            assert first["own"]["regions"] == 3 and first["changed"]["regions"] == 1
            assert bytes(await world.node.volumes[0].read(REGION, 1)) == b"\5"
            await world.restart(cut=cut)

    primary(test)


@pytest.mark.parametrize(("damaged", "older"), [("w", "v"), ("v", "w")])
def test_a_damaged_layer_costs_what_needs_any_other_of_that_snapshot(
    damaged: str, older: str
) -> None:
    """I5: an older snapshot of another volume alone needs what the damaged one kept of that."""

    async def test(world: Primary) -> None:
        index = ("v", "w").index(older)
        await world.write(0, 1, volume=index)
        await world.take(older)
        await world.take(None)
        await world.write(0, 2, volume=index)
        await world.take(None)
        await world.write(0, 3, volume=index)
        uuid = world.node.people.list()[1]["uuid"]
        await world.node.stop()
        world.disk.flip(f"/state/snapshots/{uuid}.{damaged}", 0)
        await world.start()
        assert world.states() == ["lost", "lost", "ok"]
        assert (await world.fills(f"{older}@3"))[0] == 2

    primary(test)


def test_a_first_write_into_a_snapshot_that_is_cut_costs_no_snapshot() -> None:
    """O18, O7, V9: the file for it may be there by then, but names nothing that is not."""

    outcomes = set()

    async def prepare(world: Primary) -> None:
        await world.write(0, 1)
        await world.take()
        await world.take()
        await world.node.people.export("2", True)

    async def write(world: Primary) -> None:
        snapshot = world.served("v@2")
        change = Change(codec.WRITE, 0, 0, REGION, bytes([6]) * REGION)
        rest = snapshot.write(snapshot, [change], durable=True)
        assert rest is not None
        await rest

    async def check(dead: Primary, nth: int, done: bool) -> None:
        for seed in range(6):
            world = await dead.revived(f"{nth} {seed}")
            assert world.states() == ["ok", "ok"], nth
            assert (await world.fills("v@1"))[0] == 1
            found = (await world.fills("v@2"))[0]
            assert found == 6 if done else found in (1, 6), nth
            outcomes.add(found)

    run(cut_at_each(range(1, 22), prepare, write, check))
    assert outcomes == {1, 6}


@pytest.mark.parametrize("stopping", [False, True])
def test_a_failed_sync_of_what_was_written_into_a_snapshot_is_final(stopping: bool) -> None:
    """O16: over a restart nobody could tell what of it is on the disk; the volume goes on."""

    async def test(world: Primary) -> None:
        await world.write(0, 1)
        await world.take()
        await world.take()
        await world.node.people.export("2", True)
        snapshot = world.served("v@2")
        change = Change(codec.WRITE, 0, 0, REGION, bytes([6]) * REGION)
        rest = snapshot.write(snapshot, [change])
        assert rest is not None
        await rest

        def fail(operation: str, path: str, nth: int) -> Fault | None:
            return Fault(Kind.LOSE) if operation == "sync" and path.endswith(OWN) else None

        world.disk.faults = fail
        if stopping:
            await world.restart(cut=False)
        else:
            with pytest.raises(VolumeFailed):
                await snapshot.flush()
        world.disk.faults = None
        for cut in (False, True):
            assert world.states() == ["ok", "lost"]
            assert (await world.fills("v@1"))[0] == 1
            assert (await world.volume_fills())[0] == 1
            await world.restart(cut=cut)

    primary(test)


def test_refresh_makes_it_anew_with_its_number() -> None:
    """V10: nothing is copied, and the uuid, which names a content, is new."""

    async def test(world: Primary) -> None:
        await world.write(0, 1)
        await world.take()
        await world.write(0, 2)
        before = world.node.people.list()[0]
        after = await world.node.people.refresh("1")
        assert after["number"] == 1 and after["uuid"] != before["uuid"]
        assert (await world.fills("v@1"))[0] == 2
        assert len(world.node.people.list()) == 1

    primary(test)


def test_of_two_who_refresh_a_snapshot_at_once_one_is_told() -> None:
    """V10: one snapshot is left under its number, not two."""

    async def test(world: Primary) -> None:
        await world.take()
        people = world.node.people
        results = await asyncio.gather(
            people.refresh("1"), people.refresh("1"), return_exceptions=True
        )
        (told,) = [one for one in results if isinstance(one, Refused)]
        assert "about to be taken anew" in str(told)
        assert [one["number"] for one in people.list()] == [1]

    primary(test)


def test_at_the_limit_of_their_number_no_more_are_taken() -> None:
    async def test(world: Primary) -> None:
        await world.take()
        await world.take()
        with pytest.raises(Refused, match="2 snapshots already"):
            await world.take()
        await world.node.people.refresh("2")
        await world.node.people.delete("1", False)
        await world.take()

    primary(test, SnapshotConfig(count_max=2))


def test_where_the_space_ends_the_oldest_unprotected_goes_and_the_volume_goes_on() -> None:
    async def test(world: Primary) -> None:
        await world.take(protected=True)
        for region in range(4):
            await world.write(region, 1)
        await world.take()
        for region in range(3, 6):
            await world.write(region, 2)
        await world.take()
        await world.write(0, 3)
        assert world.states() == ["ok", "ok", "ok"]
        await world.write(1, 3)
        assert world.states() == ["ok", "lost", "ok"]
        # What the protected one needs of the one that went has moved to it.
        assert await world.fills("v@1") == [0] * REGIONS
        assert await world.fills("v@3") == [1, 1, 1, 2, 2, 2] + [0] * 10
        for region in range(4, 12):
            await world.write(region, 3)
        assert world.states() == ["lost", "lost", "lost"]
        await world.group.flush()
        lost = world.node.people.list()[1]
        assert "space" in lost["why"]
        await world.restart(cut=True)
        assert world.states() == ["lost", "lost", "lost"]
        assert bytes(await world.node.volumes[0].read(11 * REGION, 1)) == b"\3"

    primary(test, SnapshotConfig(space_max=8 * REGION))


def test_on_a_full_disk_what_goes_makes_room_for_what_a_protected_one_needs_of_it() -> None:
    """The policy, where the disk itself is full: the one that goes takes up all that there is until
    it is gone, and part of it has to move first."""

    async def test(world: Primary) -> None:
        for region in range(REGIONS):
            await world.write(region, 1)
        await world.take(protected=True)
        for region in range(6):
            await world.write(region, 2)
        await world.take()
        for region in range(2, 9):
            await world.write(region, 3)
        await world.take()
        await world.group.flush()
        used = sum(inode.cache.allocated() for inode in world.disk._inodes())
        world.disk.capacity = used + REGION // 2
        for region in range(4):
            await world.write(region, 4)
        assert world.states() == ["ok", "lost", "ok"]
        assert await world.fills("v@1") == [1] * REGIONS
        world.disk.capacity = None
        wanted = [2, 2] + [3] * 7 + [1] * 7
        for cut in (False, True):
            assert await world.fills("v@3") == wanted
            assert await world.fills("v@1") == [1] * REGIONS
            await world.restart(cut=cut)

    primary(test)


def test_an_error_of_the_layers_disk_costs_the_snapshots_never_the_volume() -> None:
    async def test(world: Primary) -> None:
        await world.write(0, 1)
        await world.take()
        await world.take()

        def fail(operation: str, path: str, nth: int) -> Fault | None:
            broken = operation == "sync" and path.startswith("/state/snapshots/")
            return Fault(Kind.ERROR, 5) if broken else None

        world.disk.faults = fail
        await world.write(0, 2)
        world.disk.faults = None
        assert world.states() == ["lost", "lost"]
        assert bytes(await world.node.volumes[0].read(0, 1)) == b"\2"
        await world.group.flush()
        await world.restart(cut=True)
        assert world.states() == ["lost", "lost"]
        await world.take()
        await world.write(0, 3)
        assert (await world.fills("v@3"))[0] == 2

    primary(test)


def test_a_snapshot_in_use_is_not_deleted_and_an_unknown_one_is_named() -> None:
    async def test(world: Primary) -> None:
        await world.take()
        world.served("v@1").clients += 1
        with pytest.raises(Refused, match="1 clients attached"):
            await world.node.people.delete("1", False)
        world.served("v@1").clients -= 1
        with pytest.raises(UsageError, match=r"no snapshot '9' \(snapshots: 1\)"):
            await world.node.people.delete("9", False)
        found: dict[str, Any] = world.node.people.list()[0]
        await world.node.people.delete("v@" + found["uuid"][:8], False)
        assert world.node.people.list() == []

    primary(test)
