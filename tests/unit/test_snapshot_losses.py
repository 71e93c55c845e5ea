"""What becomes of snapshots where space ends, a disk errs, or a command is cut (V9, V10)."""

from __future__ import annotations

import asyncio
import errno

import pytest

from nbdmirror.codec import mark as marks
from nbdmirror.codec import record as codec
from nbdmirror.codec.mark import Mark
from nbdmirror.config import SnapshotConfig
from nbdmirror.engine import snapshotcommands
from nbdmirror.errors import StateError, UsageError
from tests.sim.faults import Fault, Kind
from tests.sim.file import SimFile
from tests.unit.primary import REGION, Primary, primary

SPACE = SnapshotConfig(space_max=4 * REGION)


def test_an_error_of_the_moment_costs_the_one_before_nothing() -> None:
    """V9: a snapshot is deleted; what the one before needs of it is read once more."""

    async def test(world: Primary) -> None:
        await world.write(0, 1)
        await world.take()
        await world.take()
        await world.write(0, 2)
        layer = world.node.snapshots.entries[1]["uuid"]
        struck = 0

        def once(operation: str, path: str, nth: int) -> Fault | None:
            nonlocal struck
            if operation in ("read", "try_pread") and layer in path and not struck:
                struck += 1
                return Fault(Kind.ERROR)
            return None

        world.disk.faults = once
        await world.node.people.delete("2", False)
        assert struck == 1
        assert (await world.fills("v@1"))[0] == 1

    primary(test)


def test_what_takes_the_space_goes_of_whatever_volume() -> None:
    """The policy: the oldest unprotected one goes, not one that keeps nothing."""

    async def test(world: Primary) -> None:
        for region in range(4):
            await world.write(region, 1)
        await world.take("v")
        for region in range(4):
            await world.write(region, 2)
        await world.take("w", protected=True)
        await world.write(0, 3, volume=1)
        assert world.states() == ["lost", "ok"]
        assert world.node.snapshots.bytes_kept == REGION

    primary(test, SPACE)


@pytest.mark.parametrize("restarted", [False, True])
def test_one_that_is_lost_is_deleted_for_good(restarted: bool) -> None:
    """X4: it stays in the list until a person has seen it, and no start tells of it anew."""

    async def test(world: Primary) -> None:
        for region in range(5):
            await world.write(region, 1)
        await world.take()
        for region in range(5):
            await world.write(region, 2)
        assert world.states() == ["lost"]
        if restarted:
            await world.restart(cut=False)
            told: list[str] = []
            world.node.events.listen(lambda event: told.append(str(event["kind"])))
            await asyncio.sleep(5)
            assert world.states() == ["lost"]
            assert not [kind for kind in told if kind.startswith("snapshot")]
        await world.node.people.delete("1", False)
        assert world.states() == []

    primary(test, SPACE)


def test_one_that_is_given_up_twice_stays_in_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """X4: a start goes on with what a crash had cut, and another that makes room for it takes it
    along: it is told once, and does not vanish (seed 8372238)."""

    async def test(world: Primary) -> None:
        await world.take()
        snapshots = world.node.snapshots
        (entry,) = snapshots.entries
        told: list[str] = []
        world.node.events.listen(lambda event: told.append(str(event["kind"])))

        async def takes_along(*_merged: object) -> None:
            await snapshots.lose([entry["uuid"]], "no space")

        monkeypatch.setattr(snapshots, "_merge", takes_along)
        entry.update(deleting=True, giving_up="no space")
        await snapshots.finish_delete(entry)
        assert world.states() == ["lost"]
        assert [kind for kind in told if kind.startswith("snapshot")] == ["snapshot-lost"]

    primary(test)


def test_a_refresh_that_is_cut_leaves_one_of_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """V10: the new one is there, durably, when the power fails; the old one goes."""

    async def test(world: Primary) -> None:
        await world.write(0, 1)
        await world.take()
        begun = asyncio.Event()

        async def hangs(entry: object) -> None:
            begun.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(world.node.snapshots, "delete", hangs)
        refresh = asyncio.ensure_future(world.node.people.refresh("1"))
        await begun.wait()
        await world.restart(cut=True)
        assert refresh.cancelled()
        await asyncio.sleep(5)
        assert [(found["number"], found["state"]) for found in world.node.people.list()] == [
            (1, "ok")
        ]

    primary(test)


def test_a_secondary_that_is_full_follows_a_refresh() -> None:
    """V10: one comes, one goes; neither is refused for the other."""

    async def test(world: Primary) -> None:
        await world.take()
        node, state = world.node, world.node.store.state
        old = node.snapshots.entries[0]["uuid"]
        state.update(role="secondary", upstream={"consistent": True})
        mark = Mark(marks.SNAPSHOT, "f" * 32, (0,), 1, replaces=old)
        payload, seq = mark.encode(), node.log.next_seq
        size = len(payload)
        await node._follower.marked(codec.Record(codec.MARK, 0, 1, 0, seq, 0, size, 0, payload))
        await asyncio.sleep(5)
        assert [(one["uuid"], one["state"]) for one in node.people.list()] == [("f" * 32, "ok")]
        state["role"] = "primary"

    primary(test, SnapshotConfig(count_max=1))


@pytest.mark.parametrize("path", ["/state/snapshots/", "/facets/"])
def test_a_start_with_too_few_descriptors_loses_nothing(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 35, I8: a lower limit for once. What could not be opened is what it was."""

    async def test(world: Primary) -> None:
        await world.write(0, 1)
        await world.take()
        await world.node.stop()
        opened = world.disk.open

        def short(name: str, **more: bool) -> SimFile:
            if name.startswith(path):
                raise OSError(errno.EMFILE, "Too many open files", name)
            return opened(name, **more)

        with monkeypatch.context() as patch:
            patch.setattr(world.disk, "open", short)
            with pytest.raises(StateError, match="too few descriptors"):
                await world.start()
        await world.start()
        assert world.states() == ["ok"]
        assert [one.in_service for one in world.node.volumes[0].facets] == [True]

    primary(test)


def test_a_difference_is_of_the_volumes_that_both_have() -> None:
    """V9: one of the whole group, and one of a single volume."""

    async def test(world: Primary) -> None:
        await world.take(None)
        await world.write(0, 1)
        await world.write(0, 1, volume=1)
        await world.take("v")
        for first, last in (("1", "2"), ("2", "1")):
            found = world.node.people.diff(first, last, None)
            assert [one["volume"] for one in found["ranges"]] == ["v"]
            with pytest.raises(UsageError, match="volume w is not in snapshot"):
                world.node.people.diff(first, last, "w")

    primary(test)


def test_a_difference_of_many_ranges_is_told_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """I6: its size is that of all of them; nobody is kept waiting for millions of ranges."""
    monkeypatch.setattr(snapshotcommands, "RANGES_MAX", 2)

    async def test(world: Primary) -> None:
        await world.take()
        for region in (0, 2, 15):
            await world.write(region, 1)
        found = world.node.people.diff("1", None, None)
        assert (found["bytes"], len(found["ranges"]), found["more"]) == (3 * REGION, 2, True)

    primary(test)
