"""Whole disks as facets, by the names that a kernel gives them, and by those that stay."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.guest import guest
from tests.guest.guest import Disk
from tests.guest.kernel import TREE
from tests.integration.cluster import MIB

SECONDS = 300.0


def test_disks_whose_names_a_boot_changes(tmp_path: Path) -> None:
    """I5, fault 29: a primary does not serve one volume's disk as another's; told by a name that
    stays it knows each again.

    Runbook: two disks have exchanged their names."""
    state, first, second = (tmp_path / name for name in ("state", "first", "second"))
    for path, size in ((state, 64 * MIB), (first, 8 * MIB), (second, 8 * MIB)):
        with path.open("wb") as file:
            file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", str(state)], check=True)
    disks = [Disk(first, serial="rack-1"), Disk(second, serial="rack-2")]
    for boot, order in (("first", disks), ("second", disks[::-1])):
        environment = {"TREE": str(TREE), "BOOT": boot}
        guest.run("disks", SECONDS, disks=[Disk(state), *order], environment=environment).check()
    assert first.read_bytes().count(b"a") == second.read_bytes().count(b"b") == MIB
