"""The doors of snapshots: who attaches them, what names are, who may change them (4.1, I9)."""

from __future__ import annotations

import pytest

from nbdmirror.codec.nbd import ExportInfo
from nbdmirror.codec.nbdhandshake import Forbidden
from nbdmirror.config import AccessConfig
from nbdmirror.engine.access import Client, Rules
from nbdmirror.engine.export import ExportServer
from nbdmirror.engine.methods import METHODS
from nbdmirror.errors import UsageError
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
