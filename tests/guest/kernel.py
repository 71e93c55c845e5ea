"""Debian's kernel, unpacked beside the tree's other caches: never installed, never run here.

Owns ``.cache/guest``: the package is fetched once with ``apt-get download`` and unpacked with
``dpkg -x``; both work without root. Used by ``guest``; knows nothing of QEMU.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
CACHE = TREE / ".cache" / "guest"

# The cloud kernel has no 9p, so the host's files go in by virtiofs, whose daemon needs root.
METAPACKAGES = {"cloud": "linux-image-cloud-amd64", "generic": "linux-image-amd64"}


class KernelError(Exception):
    """No kernel can be had; the message says what was tried."""


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

    Fetched at first use. KernelError if the package cannot be had."""
    flavour = flavour or default_flavour()
    directory = CACHE / flavour
    if not directory.exists():
        with _one_at_a_time():
            if not directory.exists():
                _fetch(flavour, directory)
    (image,) = directory.glob("boot/vmlinuz-*")
    (modules,) = directory.glob("lib/modules/*")
    return Kernel(flavour, image, modules)


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Processes of one test run fetch one after the other, and then find what the first fetched."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(flavour: str, directory: Path) -> None:
    """Fetches and unpacks next to ``directory`` and renames: what is there is complete."""
    work = Path(tempfile.mkdtemp(prefix="fetch-", dir=CACHE))
    try:
        package = _package(METAPACKAGES[flavour])
        _run("apt-get", "-q", "download", package, cwd=work)
        (archive,) = work.glob("*.deb")
        root = work / "root"
        _run("dpkg", "-x", str(archive), str(root), cwd=work)
        (modules,) = root.glob("lib/modules/*")
        # The package leaves this to its installation.
        _run("depmod", "-b", str(root), modules.name, cwd=work)
        root.rename(directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _package(metapackage: str) -> str:
    """The package that the metapackage stands for, after ``apt-get update`` if apt knows none."""
    for update in (False, True):
        if update:
            _run(*([] if os.geteuid() == 0 else ["sudo"]), "apt-get", "-q", "update", cwd=CACHE)
        done = subprocess.run(
            ["apt-cache", "depends", metapackage], capture_output=True, text=True, check=False
        )
        for line in done.stdout.splitlines():
            kind, _, name = line.strip().partition(": ")
            if kind == "Depends" and name.startswith("linux-image-"):
                return name
    raise KernelError(f"apt knows no {metapackage}: is this Debian on amd64?")


def _run(*argv: str, cwd: Path) -> None:
    # depmod lives in a directory that an ordinary user's PATH lacks.
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "LC_ALL": "C"}
    done = subprocess.run(
        argv, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise KernelError(f"{' '.join(argv)} -> {done.returncode}\n{done.stdout}{done.stderr}")
