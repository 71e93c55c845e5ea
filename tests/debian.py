"""Debian packages, unpacked beside the tree's other caches: never installed.

Owns ``.cache``: a package is fetched once with ``apt-get download`` and unpacked with ``dpkg -x``;
both work without root. For what is too large to install, or would be started by that.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

TREE = Path(__file__).resolve().parents[1]
CACHE = TREE / ".cache"


class FetchError(Exception):
    """A package cannot be had; the message says what was tried."""


def unpacked(
    place: str, package: Callable[[], str], finish: Callable[[Path], None] = lambda root: None
) -> Path:
    """The directory ``place`` of the cache, with the files of a package; fetched at first use.

    ``package`` says which one, ``finish`` completes the files. FetchError if it cannot be had."""
    directory = CACHE / place
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(directory.parent):
            if not directory.exists():
                _fetch(directory, package(), finish)
    return directory


@contextlib.contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Processes of one test run fetch one after the other, and then find what the first fetched."""
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(directory: Path, package: str, finish: Callable[[Path], None]) -> None:
    """Fetches and unpacks next to ``directory`` and renames: what is there is complete."""
    work = Path(tempfile.mkdtemp(prefix="fetch-", dir=directory.parent))
    try:
        run("apt-get", "-q", "download", package, cwd=work)
        (archive,) = work.glob("*.deb")
        root = work / "root"
        run("dpkg", "-x", str(archive), str(root), cwd=work)
        finish(root)
        root.rename(directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def refresh() -> None:
    """Has apt read its lists: where there are none, it knows no package."""
    run(*([] if os.geteuid() == 0 else ["sudo"]), "apt-get", "-q", "update", cwd=TREE)


def known(package: str) -> str:
    """The package's own name, once apt knows it."""
    done = subprocess.run(["apt-cache", "show", package], capture_output=True, check=False)
    if done.returncode != 0:
        refresh()
    return package


def run(*argv: str, cwd: Path) -> None:
    """Runs a program; FetchError with its output if it fails."""
    # depmod lives in a directory that an ordinary user's PATH lacks.
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "LC_ALL": "C"}
    done = subprocess.run(
        argv, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise FetchError(f"{' '.join(argv)} -> {done.returncode}\n{done.stdout}{done.stderr}")
