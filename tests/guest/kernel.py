"""Debian's kernel, unpacked (see ``tests.debian``): never installed, never run here.

Used by ``guest``; knows nothing of QEMU.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.debian import TREE, FetchError, refresh, run, unpacked

__all__ = ["METAPACKAGES", "TREE", "Kernel", "kernel"]

# The cloud kernel has no 9p, so the host's files go in by virtiofs, whose daemon needs root.
METAPACKAGES = {"cloud": "linux-image-cloud-amd64", "generic": "linux-image-amd64"}


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel package."""

    flavour: str
    image: Path
    modules: Path

    @property
    def share(self) -> str:
        """How the host's files are shown to this kernel: ``virtiofs`` or ``9p``."""
        return "virtiofs" if self.flavour == "cloud" else "9p"


def default_flavour() -> str:
    """The cloud kernel where virtiofsd can run (as root), otherwise the generic one."""
    return "cloud" if os.geteuid() == 0 else "generic"


def kernel(flavour: str | None = None) -> Kernel:
    """The kernel of that flavour (``cloud``, ``generic``; None: what fits this user).

    Fetched at first use. FetchError if the package cannot be had."""
    flavour = flavour or default_flavour()
    directory = unpacked(f"guest/{flavour}", lambda: _package(METAPACKAGES[flavour]), _index)
    (image,) = directory.glob("boot/vmlinuz-*")
    (modules,) = directory.glob("lib/modules/*")
    return Kernel(flavour, image, modules)


def _index(root: Path) -> None:
    """The package leaves this to its installation."""
    (modules,) = root.glob("lib/modules/*")
    run("depmod", "-b", str(root), modules.name, cwd=root)


def _package(metapackage: str) -> str:
    """The package that the metapackage stands for, after ``apt-get update`` if apt knows none."""
    for update in (False, True):
        if update:
            refresh()
        done = subprocess.run(
            ["apt-cache", "depends", metapackage], capture_output=True, text=True, check=False
        )
        for line in done.stdout.splitlines():
            kind, _, name = line.strip().partition(": ")
            if kind == "Depends" and name.startswith("linux-image-"):
                return name
    raise FetchError(f"apt knows no {metapackage}: is this Debian on amd64?")
