"""Which disk a block device is (I5, fault 29), on a sysfs as kernels lay it out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdmirror.edge.devices import identity


def device(sysfs: Path, number: str, place: str, **files: str) -> int:
    """A device's directory, with its files, and the link by its number; that number."""
    directory = sysfs / "devices" / place
    for name, text in files.items():
        path = directory / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    directory.mkdir(parents=True, exist_ok=True)
    (sysfs / number).symlink_to(directory)
    major, minor = map(int, number.split(":"))
    return os.makedev(major, minor)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"dm__uuid": "LVM-Zq7\n", "dm__name": "vg-lv\n"}, "device:LVM-Zq7"),
        ({"md__uuid": "a:b:c:d\n"}, "device:a:b:c:d"),
        ({"wwid": "eui.0025\n", "device__serial": "of the controller\n"}, "device:eui.0025"),
        ({"device__wwid": "t10.ATA     DISK      1 \n"}, "device:t10.ATA DISK 1"),
        ({"serial": "rack-7"}, "device:rack-7"),
        ({"device__cid": "1501\n"}, "device:1501"),
    ],
    ids=["dm", "md", "nvme", "scsi", "virtio", "mmc"],
)
def test_what_a_disk_says_that_it_is(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    assert identity(device(tmp_path, "8:0", "pci/disk", **files), tmp_path) == expected


def test_a_partition_is_its_disk_and_its_place(tmp_path: Path) -> None:
    device(tmp_path, "8:0", "sda", device__wwid="naa.5\n")
    first = device(tmp_path, "8:1", "sda/sda1", partition="1\n", start="2048\n")
    second = device(tmp_path, "8:2", "sda/sda2", partition="2\n", start="4096\n")
    assert identity(first, tmp_path) == "device:naa.5@2048"
    assert identity(second, tmp_path) == "device:naa.5@4096"


def test_nothing_is_guessed(tmp_path: Path) -> None:
    """A loop device, one without a serial number, a partition of such a one, no sysfs at all."""
    assert identity(device(tmp_path, "7:0", "loop0", loop__backing_file="/file\n"), tmp_path) == ""
    assert identity(device(tmp_path, "254:0", "vda", serial="\n"), tmp_path) == ""
    part = device(tmp_path, "254:1", "vda/vda1", partition="1\n", start="2048\n")
    assert identity(part, tmp_path) == ""
    assert identity(os.makedev(9, 9), tmp_path) == ""
    assert identity(os.makedev(9, 9), tmp_path / "none") == ""
