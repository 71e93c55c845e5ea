"""The superblock's file (O11, O16, O18): saved whole, never half, whatever is cut or fails."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nbdmirror.codec import slots
from nbdmirror.config import SnapshotConfig
from nbdmirror.engine.create import MARK
from nbdmirror.engine.store import FILE_NAME, Store
from nbdmirror.errors import DiskFailed, NbdmirrorError, Refused, StateError
from tests.sim.faults import AllLost, Fault, Kind, Miswrites
from tests.unit.primary import Primary
from tests.unit.world import STATE, fail, make_disk, run

FIRST: dict[str, Any] = {"format": 1, "n": 0}


def test_what_was_saved_is_read_back() -> None:
    async def main() -> None:
        disk = make_disk()
        store = await Store.create(disk, STATE, dict(FIRST))
        for number in range(1, 6):
            store.state["n"] = number
            await store.save()
            disk.power_cut()
            store = Store.open(disk, STATE)
            assert store.state == {"format": 1, "n": number}

    run(main())


def test_a_power_cut_leaves_the_old_state_or_the_new_one() -> None:
    """O11: one slot stays untouched until the other is durable; every cut of a save is tried."""

    async def main() -> None:
        seen = set()
        for seed in range(60):
            disk = make_disk(seed)
            store = await Store.create(disk, STATE, dict(FIRST))
            for number in (1, 2, 3):
                store.state["n"] = number
                await store.save()
            store.state.update(n=4, filler="x" * 3000)
            saving = asyncio.ensure_future(store.save())
            await asyncio.sleep(1e-6)
            disk.power_cut()
            seen.add(Store.open(disk, STATE).state["n"])
            saving.cancel()
        assert seen == {3, 4}

    run(main())


@pytest.mark.parametrize("saves", [1, 2])
def test_a_save_that_went_astray_into_the_other_slot_counts_and_is_told(saves: int) -> None:
    """Fault 16, O11: the next save goes to the slot that it was meant for, so that one slot is
    always whole; that the state is of a clean stop says nothing then."""

    async def main() -> None:
        disk = make_disk()
        store = await Store.create(disk, STATE, {**FIRST, "clean": True})
        for number in range(1, saves + 1):
            store.state["n"] = number
            if number == saves:
                shift = slots.SLOT_SIZE * (-1 if saves == 1 else 1)
                disk.faults = Miswrites(f"{STATE}/{FILE_NAME}", Fault(Kind.STRAY, shift=shift))
            await store.save()
        for number in range(saves, saves + 5):
            store = Store.open(disk, STATE)
            assert store.state["n"] == number
            assert (store.damaged is not None) == (number < saves + 2)
            assert store.state["clean"] == (number >= saves + 2)
            store.state.update(n=number + 1, clean=True)
            await store.save()

    run(main())


def test_of_a_file_that_was_cut_short_the_rest_is_doubted() -> None:
    """X1: what lay behind may have been the newer state, and was not never written."""

    async def main() -> None:
        disk = make_disk()
        store = await Store.create(disk, STATE, {**FIRST, "clean": True})
        store.state["n"] = 1
        await store.save()
        disk.open(f"{STATE}/{FILE_NAME}").truncate(slots.SLOT_SIZE)
        store = Store.open(disk, STATE)
        assert store.state["n"] == 0 and not store.state["clean"]
        assert store.damaged is not None and "cut short" in store.damaged
        disk.open(f"{STATE}/{FILE_NAME}").truncate(5)
        with pytest.raises(StateError, match="cut short"):
            Store.open(disk, STATE)

    run(main())


def test_a_change_during_a_save_is_in_the_next() -> None:
    async def main() -> None:
        disk = make_disk()
        store = await Store.create(disk, STATE, dict(FIRST))
        store.state["n"] = 1
        first = asyncio.ensure_future(store.save())
        await asyncio.sleep(1e-6)
        store.state["n"] = 2
        await asyncio.gather(first, store.save())
        disk.power_cut()
        assert Store.open(disk, STATE).state["n"] == 2

    run(main())


@pytest.mark.parametrize("operation", ["pwrite", "sync"])
def test_a_disk_error_is_told_and_the_old_state_stays(operation: str) -> None:
    async def main() -> None:
        disk = make_disk()
        store = await Store.create(disk, STATE, dict(FIRST))
        disk.faults = fail(operation)
        store.state["n"] = 9
        with pytest.raises(DiskFailed, match="superblock"):
            await store.save()
        assert disk.fired
        disk.power_cut()
        assert Store.open(disk, STATE).state["n"] in (0, 9)

    run(main())


def test_after_a_failed_sync_no_save_succeeds() -> None:
    """O16, fault 9."""

    async def main() -> None:
        disk = make_disk()
        store = await Store.create(disk, STATE, dict(FIRST))
        disk.faults = fail("sync")
        for _ in range(3):
            with pytest.raises(DiskFailed):
                await store.save()

    run(main())


def test_what_cannot_be_used_is_named() -> None:
    async def main() -> None:
        disk = make_disk()
        with pytest.raises(StateError, match="no state of a node") as missing:
            Store.open(disk, STATE)
        assert "create" in str(missing.value.hint)
        await Store.create(disk, STATE, {"format": 2})
        with pytest.raises(StateError, match="format 2"):
            Store.open(disk, STATE)
        with pytest.raises(FileExistsError):
            await Store.create(disk, STATE, dict(FIRST))
        for offset in (0, 256 * 1024):
            disk.flip(f"{STATE}/{FILE_NAME}", offset + 3)
        with pytest.raises(StateError, match="cannot be used"):
            Store.open(disk, STATE)

    run(main())


def test_what_can_be_refused_is_refused_before_the_slot_is_full() -> None:
    """A snapshot, a facet, a remote: the node must go on to start. (Seed 5006211.)"""

    async def main() -> None:
        disk = make_disk()
        store = await Store.create(disk, STATE, dict(FIRST))
        store.state["filler"] = "x" * (slots.SLOT_SIZE * 16 // 24)
        await store.save()
        store.check_room()
        store.state["filler"] = "x" * (slots.SLOT_SIZE * 18 // 24)
        with pytest.raises(Refused, match="nearly full"):
            store.check_room()
        await store.save()

    run(main())


def test_a_state_that_outgrew_its_slot_is_final_and_the_old_one_stays() -> None:
    async def main() -> None:
        disk = make_disk()
        store = await Store.create(disk, STATE, dict(FIRST))
        failures: list[DiskFailed] = []
        store.on_failed = failures.append
        store.state["filler"] = "x" * slots.SLOT_SIZE
        with pytest.raises(DiskFailed, match="larger than its slot"):
            await store.save()
        assert failures and Store.open(disk, STATE, read_only=True).state == FIRST

    run(main())


def test_the_end_of_a_creation_is_durable_once_the_node_has_started() -> None:
    """O18: who made the node died when that was not; a later power cut must not take it back."""

    async def main() -> None:
        disk = make_disk()
        world = Primary(disk, SnapshotConfig())

        def last(operation: str, path: str, _nth: int) -> Fault | None:
            unfinished = disk.exists(f"{STATE}/{MARK}")
            hit = operation == "sync_directory" and path == STATE and not unfinished
            return Fault(Kind.ERROR) if hit else None

        disk.faults = last
        with pytest.raises(NbdmirrorError, match="cannot create the node"):
            await world.start()
        disk.faults = None
        for _ in range(2):  # it is created once
            await world.start()
            disk.power_cut(AllLost())

    run(main())
