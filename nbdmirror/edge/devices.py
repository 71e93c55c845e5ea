"""Which disk a block device is, whatever the kernel calls it this time: from sysfs.

A path such as ``/dev/sdb`` names another disk when one is added, or dies, before the next boot. So
a device is known by what the hardware, or whoever made it (LVM, MD), says that it is.
"""

from __future__ import annotations

import os
from pathlib import Path

SYSFS = Path("/sys/dev/block")
NAMES = ("dm/uuid", "md/uuid", "wwid", "device/wwid", "serial", "device/cid")
"""Where that stands, the surest first: device mapper, MD, NVMe, SCSI and ATA, virtio, MMC."""


def identity(number: int, sysfs: Path = SYSFS) -> str:
    """Of the device with that number (``st_rdev``), the same over boots; empty if nothing says it:
    of a loop device, say, or a virtio disk without a serial number. A partition is the disk that it
    is on, and where it begins there."""
    try:
        device = (sysfs / f"{os.major(number)}:{os.minor(number)}").resolve(strict=True)
        if not (device / "partition").exists():
            return _named(device)
        disk = _named(device.parent)
        return disk and f"{disk}@{_text(device / 'start')}"
    except OSError:
        return ""


def _named(device: Path) -> str:
    for name in NAMES:
        found = _text(device / name) if (device / name).exists() else ""
        if found:
            return f"device:{found}"
    return ""


def _text(path: Path) -> str:
    """Vendors fill up with blanks."""
    return " ".join(path.read_text(errors="replace").split())
