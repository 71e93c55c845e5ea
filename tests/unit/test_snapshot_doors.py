"""The doors of snapshots: who attaches them, what names are, who may change them (4.1, I9)."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from nbdmirror.codec.nbd import ExportInfo
from nbdmirror.codec.nbdhandshake import Forbidden
from nbdmirror.config import AccessConfig, NbdConfig
from nbdmirror.engine.access import Client, Rules
from nbdmirror.engine.export import ExportServer
from nbdmirror.engine.methods import METHODS
from nbdmirror.errors import NbdmirrorError, Refused, UsageError
from tests.unit import nbdclient as c
from tests.unit.primary import Primary, primary

READING = {
    "status", "wait", "events", "remote.list", "facet.list", "snapshot.list", "snapshot.diff",
}  # fmt: skip
LAPTOP = Client("192.0.2.7", ("laptop",))
STRANGER = Client("198.51.100.7", ("backup",))


def exports(world: Primary) -> ExportServer:
    assert world.node.exports is not None
    return world.node.exports


def test_what_only_looks_is_named_everything_else_is_for_owners() -> None:
    """Admin roles: a new method changes something unless this list says that it does not."""
    assert {name for name, method in METHODS.items() if not method.changing} <= READING


@pytest.mark.parametrize(
    "spec", ["\N{SUPERSCRIPT TWO}", "\N{ARABIC-INDIC DIGIT ONE}", "9" * 5000, "", "-1", "../1", "0"]
)
def test_a_name_of_no_snapshot_is_just_that(spec: str) -> None:
    """I9: digits of other scripts, and more of them than Python takes, are no defect."""

    async def test(world: Primary) -> None:
        await world.take()
        assert exports(world).find_for(LAPTOP, f"v@{spec}") is None
        with pytest.raises(UsageError, match="no snapshot"):
            await world.node.people.delete(spec, False)

    primary(test)


def test_diff_of_a_volume_that_is_not_there_is_not_empty() -> None:
    """V9: who takes a backup of what changed must not be told "nothing" about another name."""

    async def test(world: Primary) -> None:
        await world.node.people.create("v", False)
        for name, words in (("x", "no volume 'x'"), ("w", "volume w is not in snapshot 1")):
            with pytest.raises(UsageError, match=words):
                world.node.people.diff("1", None, name)

    primary(test)


def test_one_that_no_client_can_attach_is_not_made_writable() -> None:
    """V9: what the command says it cannot do is not done; to look is no failure."""

    async def test(world: Primary) -> None:
        await world.take()
        world.node.config = replace(world.config, nbd=NbdConfig())
        people = world.node.people
        with pytest.raises(NbdmirrorError, match="no address at which clients attach"):
            await people.export("1", True)
        assert await people.export("1", False) == {"writable": False, "uris": []}
        await world.restart(cut=True)
        assert [found["writable"] for found in world.node.people.list()] == [False]

    primary(test)


@pytest.mark.parametrize("what", ["deleted", "taken anew"])
def test_nobody_attaches_one_that_is_about_to_go(what: str) -> None:
    """V10: it would read errors from then on."""

    async def test(world: Primary) -> None:
        await world.take()
        people = world.node.people
        world.disk.stall(5.0)
        work = people.delete("1", True) if what == "deleted" else people.refresh("1")
        going = asyncio.ensure_future(work)
        await asyncio.sleep(1.0)
        found = exports(world).find_for(LAPTOP, "v@1")
        assert isinstance(found, Forbidden) and f"about to be {what}" in found.why
        for second in (people.delete("1", False), people.refresh("1")):
            with pytest.raises(Refused, match=f"about to be {what}"):
                await second  # its end would open what the first is still at
        assert isinstance(exports(world).find_for(LAPTOP, "v@1"), Forbidden)
        await going
        again = exports(world).find_for(LAPTOP, "v@1")
        assert again is None if what == "deleted" else isinstance(again, ExportInfo)

    primary(test)


def test_a_snapshot_is_for_the_clients_of_its_volume() -> None:
    """The rules of ``[[volume]]`` hold for what follows the @, in lists as well; ``read_only``
    too, whatever was said about the snapshot."""

    async def test(world: Primary) -> None:
        await world.take()
        await world.node.people.export("1", True)
        server = exports(world)
        server.rules = {
            "v": Rules(AccessConfig(read_only=True, names=("laptop",), addresses=("192.0.2.0/24",)))
        }
        assert isinstance(server.find_for(STRANGER, "v@1"), Forbidden)
        assert {info.name for info in server.exports_for(STRANGER)} == {"w"}
        assert {info.name for info in server.exports_for(LAPTOP)} == {"v", "v@1", "w"}
        found = server.find_for(LAPTOP, "v@1")
        assert isinstance(found, ExportInfo) and found.read_only
        server.rules = {}
        found = server.find_for(LAPTOP, "v@1")
        assert isinstance(found, ExportInfo) and not found.read_only

    primary(test)


class Transport(asyncio.Transport):
    """Takes what is sent, and sends nothing."""

    def write(self, data: bytes | bytearray | memoryview) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0


@pytest.mark.parametrize("old", [True, False])
def test_a_client_that_names_a_uuid_attaches_that_snapshot(*, old: bool) -> None:
    """While a snapshot is made anew there are two of its number."""

    async def test(world: Primary) -> None:
        await world.take()
        pair = world.node.snapshots.entries
        await world.node.people.take([0], "user", protected=False, replaced=pair[0])
        del pair[0]["deleting"]  # as while the mark of the new one is on its way to the disk
        wanted, other = (f"v@{entry['uuid']}" for entry in (pair if old else pair[::-1]))
        connection = exports(world).connection()
        connection.connection_made(Transport())
        for data in (c.client_flags(), c.go(wanted)):
            memoryview(connection.get_buffer(-1))[: len(data)] = data
            connection.buffer_updated(len(data))
        assert (world.served(wanted).clients, world.served(other).clients) == (1, 0)
        connection.connection_lost(None)

    primary(test)


def test_a_list_looks_at_each_snapshot_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """I9: what a client asks for costs what it lists; who has only connected costs no look."""

    async def test(world: Primary) -> None:
        for _ in range(20):
            await world.take(None)
        server = exports(world)
        looks = 0
        shown = world.node.snapshots.shown

        def counted(entry: dict[str, object]) -> bool:
            nonlocal looks
            looks += 1
            return shown(entry)

        monkeypatch.setattr(world.node.snapshots, "shown", counted)
        assert server.session_limits.options_max == server.limits.options_max + 4 * 42
        assert looks == 0
        assert len(server.exports_for(LAPTOP)) == 42
        assert looks == 20

    primary(test)
