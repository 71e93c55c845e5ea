"""Power cuts of both nodes, in guests (see ``tests.guest.cuts``); and that its judgement can fail.

``POWER_CUTS`` in the environment is the number of cuts a side.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.blocktrace import SECTOR
from tests.guest.cuts.campaign import CUTS_PER_PAIR, Campaign, calm
from tests.guest.cuts.disk import KEEP_ALL, KEEP_NONE, CutDisk, Fate
from tests.guest.cuts.fsck import Damaged
from tests.guest.cuts.image import judge_image
from tests.guest.cuts.load import DATABASE, Found, Load, Wrong, judge
from tests.guest.cuts.pair import Pair

CUTS = int(os.environ.get("POWER_CUTS", "2"))
SEED = 7
MIB = 1 << 20


def test_power_cuts(tmp_path: Path) -> None:
    """Faults 2, 3, 4, 7; I1, I2, I3, I4, I8, V7, O4: primary and secondary in turn."""
    sides = ["primary", "secondary"] * CUTS
    for first in range(0, len(sides), CUTS_PER_PAIR):
        campaign = Campaign(tmp_path / "pair", SEED + first, print)
        plans = campaign.plans(sides[first : first + CUTS_PER_PAIR])
        # A few cuts are to be quick.
        campaign.run([*map(calm, plans[:2]), *plans[2:]])
        shutil.rmtree(tmp_path / "pair")


def test_a_disk_that_ignores_flushes_is_seen(tmp_path: Path) -> None:
    """The whole of it can fail: what the guest's disk said was flushed is not there after a cut."""
    campaign = Campaign(tmp_path / "pair", SEED, print, lying=True)
    (plan,) = campaign.plans(["primary"])
    with pytest.raises(AssertionError, match=r"was committed|are missing"):
        campaign.run([replace(calm(plan), fate=Fate.LOST, hurry=True)])


# -- the judgement -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which a load was at work, and its promise beside it."""
    directory = tmp_path_factory.mktemp("load") / "files"
    directory.mkdir()
    promise: dict[str, int] = {}
    load = Load(directory, Found(), promise.update, journal="wal", fio_options="")
    load.start()
    end = time.monotonic() + 60
    while promise.get("files", 0) < 8 or promise["rows"] < 100:
        assert time.monotonic() < end, promise
        time.sleep(0.01)
    found = load.stop()
    assert vars(found) == promise
    (directory.parent / "promise").write_text(f"{found.rows} {found.files}")
    return directory


def copy_of(written: Path, tmp_path: Path) -> Path:
    """One of these to damage."""
    return Path(shutil.copytree(written, tmp_path / "files"))


def test_whole(written: Path) -> None:
    """What was written is found, all of it."""
    rows, files = map(int, (written.parent / "promise").read_text().split())
    assert judge(written, files) == Found(rows, files)
    assert judge(written) in (Found(rows, files), Found(rows, files - 1))


def test_nothing(tmp_path: Path) -> None:
    """Before the first row there is nothing."""
    assert judge(tmp_path) == Found()


def execute(statement: str) -> Callable[[Path], None]:
    """A change of the database."""

    def change(directory: Path) -> None:
        base = sqlite3.connect(directory / DATABASE)
        base.execute(statement)
        base.commit()
        base.close()

    return change


def flip(name: str, at: int) -> Callable[[Path], None]:
    """One bit of a file."""

    def change(directory: Path) -> None:
        with (directory / name).open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))

    return change


def oldest(directory: Path) -> str:
    """The name of the first file that is kept."""
    return min(directory.glob("fio.*"), key=lambda path: int(path.suffix[1:])).name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (execute("DELETE FROM rows WHERE n = 7"), "row 7 is missing"),
        (execute("DELETE FROM rows WHERE n = (SELECT max(n) FROM rows)"), "the slots say"),
        (execute("UPDATE rows SET payload = x'00' WHERE n = 9"), "row 9 holds what was never"),
        (execute("UPDATE slots SET n = n - 64 WHERE slot = 5"), "the slots say otherwise"),
        (flip(DATABASE, 4096), "damaged"),
        (lambda directory: (directory / oldest(directory)).unlink(), "missing"),
        (lambda directory: flip(oldest(directory), 300_000)(directory), "fio does not find"),
    ],
)
def test_damage_is_seen(
    written: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    """Rows, slots, pages, files: whatever is wrong is told."""
    directory = copy_of(written, tmp_path)
    _, files = map(int, (written.parent / "promise").read_text().split())
    change(directory)
    with pytest.raises(Wrong, match=message):
        judge(directory, files)


def test_image(written: Path, tmp_path: Path) -> None:
    """An ext4 with all of it is good; one whose tables contradict each other is not."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(32 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", str(written), str(image)], check=True)
    assert judge_image(image).rows > 0
    subprocess.run(["debugfs", "-w", "-R", f"clri {DATABASE}", str(image)], check=True)
    with pytest.raises(Damaged, match="has deleted/unused inode"):
        judge_image(image)


def test_a_difference_is_seen(tmp_path: Path) -> None:
    """Two facets that differ in one byte differ."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for path in (ours, theirs):
        with path.open("wb") as file:
            file.truncate(48 * MIB)
    Pair.compare(ours, theirs)
    flip("theirs", 40 * MIB)(tmp_path)
    with pytest.raises(Wrong, match="differ in 1 regions"):
        Pair.compare(ours, theirs)


# -- the disk ------------------------------------------------------------------------------------


def trace_of(*entries: tuple[int, bytes] | None) -> bytes:
    """A trace with these writes (sector, data); ``None`` is a flush."""
    parts = [struct.pack("<QQQI", 0x6A736677736872, 1, len(entries), SECTOR).ljust(SECTOR, b"\0")]
    for number, entry in enumerate(entries):
        sector, data = entry or (0, b"")
        head = struct.pack("<QQQQ", sector, len(data) // SECTOR, 0 if entry else 1, number)
        parts += [head.ljust(SECTOR, b"\0"), data]
    return b"".join(parts)


@pytest.mark.parametrize(
    ("lies", "keep", "left"),
    [(False, KEEP_NONE, b"A"), (False, KEEP_ALL, b"AB"), (True, KEEP_NONE, b"")],
)
def test_what_a_cut_leaves(tmp_path: Path, lies: bool, keep: int, left: bytes) -> None:
    """What was flushed stays; what was not is lost, where that is the fate; a disk that lies about
    flushes loses that too."""
    disk = CutDisk(tmp_path / "disk", 8 * SECTOR)
    live = disk.switch_on()
    assert live.trace is not None
    live.trace.write_bytes(trace_of((1, b"A" * SECTOR), None, (2, b"B" * SECTOR)))
    if lies:
        disk.lies_from = SECTOR
    disk.cut(disk.clock(), keep)
    sectors = [bytes(1), *(bytes([letter]) for letter in left)]
    assert disk.path.read_bytes() == b"".join(s * SECTOR for s in sectors).ljust(8 * SECTOR, b"\0")
