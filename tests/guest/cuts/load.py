"""What is written while the power is cut, and what may be found of it afterwards.

Owns: a database that commits one row after another, fio jobs that write one file after another,
and the judgement of a directory that holds both. The two are tied together: row n tells how many
files were complete when its transaction began, and a file is deleted only behind a row. So what
is found shows whether it is a prefix of all that was written, without a word from outside.
Runs in the guest; the judgement also on the host. Imports little: starting must be cheap there.

    rows 1..n    transaction n inserts row n and overwrites slot n % SLOTS with n
    files        fio.1, fio.2, ...: the last KEEP that row n knows of are there, and later ones
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import subprocess
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SLOTS = 64
KEEP = 4
"""Files that are kept."""
FILES_PER_RUN = 300
"""More than a slow machine gets through between two starts of the load."""
ROW_BYTES_MAX = 2000
CHECKPOINT_PAGES = 40
"""The write-ahead log goes back into the database this often."""
DATABASE = "base.db"
STOP_S = 60.0

_GLOBAL = """
[global]
thread=1
rw=randwrite
bs=8k
size=512k
verify=crc32c
verify_state_save=0
"""


class Wrong(AssertionError):
    """What was found is no state that the writes could have led to."""


@dataclass(frozen=True)
class Found:
    """The rows and files that are there, or that must be."""

    rows: int = 0
    files: int = 0


def payload(number: int) -> bytes:
    """What row ``number`` holds."""
    digest = hashlib.sha256(str(number).encode()).digest()
    size = 50 + int.from_bytes(digest[:2], "little") % ROW_BYTES_MAX
    return (digest * (size // len(digest) + 1))[:size]


# -- the judgement -------------------------------------------------------------------------------


def judge(directory: Path, files_least: int = 0) -> Found:
    """What is there; Wrong if it is no state of this history, or if a file up to ``files_least``
    is missing that no row had given up."""
    found = _judge_database(directory / DATABASE)
    files = max(found.files, files_least)
    _judge_files(directory, range(max(found.files - KEEP, 0) + 1, files + 1))
    return Found(found.rows, files)


def _judge_database(path: Path) -> Found:
    if not path.exists():
        return Found()
    base = sqlite3.connect(path)
    try:
        problems = [text for (text,) in base.execute("PRAGMA integrity_check")]
        if problems != ["ok"]:
            raise Wrong(f"the database is damaged: {problems[:5]}")
        if not base.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return Found()
        rows = base.execute("SELECT n, files, payload FROM rows ORDER BY n").fetchall()
        slots = dict(base.execute("SELECT slot, n FROM slots"))
    except sqlite3.DatabaseError as error:
        raise Wrong(f"the database is damaged: {error}") from error
    finally:
        base.close()
    files = 0
    for place, (number, known, content) in enumerate(rows, 1):
        if number != place:
            raise Wrong(f"row {place} is missing, row {number} is there")
        if content != payload(number) or known < files:
            raise Wrong(f"row {number} holds what was never written")
        files = known
    last = len(rows)
    newest = {n % SLOTS: n for n in range(max(1, last - SLOTS + 1), last + 1)}
    if slots != newest:
        wrong = sorted(slots.items() ^ newest.items())[:5]
        raise Wrong(f"rows end at {last}, the slots say otherwise: {wrong}")
    return Found(last, files)


def _judge_files(directory: Path, numbers: range) -> None:
    missing = [n for n in numbers if not (directory / f"fio.{n}").exists()]
    if missing:
        raise Wrong(f"of files {numbers.start} to {numbers.stop - 1} these are missing: {missing}")
    if not numbers:
        return
    with tempfile.TemporaryDirectory() as place:
        job = Path(place, "job")
        job.write_text(
            f"{_GLOBAL}directory={directory}\nverify_only=1\n"
            + "".join(f"[{n}]\nfilename=fio.{n}\nrandseed={n}\nstonewall\n" for n in numbers)
        )
        done = subprocess.run(
            ["fio", f"--output={place}/out", str(job)],
            cwd=place,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise Wrong(f"fio does not find what it wrote:\n{done.stderr[:2000]}")


# -- the writers ---------------------------------------------------------------------------------


class Load:
    """The database and fio at work in ``directory``, from ``found`` on; ``report`` is called with
    what must be there from then on, from a thread."""

    def __init__(
        self,
        directory: Path,
        found: Found,
        report: Callable[[dict[str, Any]], None],
        *,
        journal: str,
        fio_options: str,
    ) -> None:
        """``journal``: sqlite's journal mode. ``fio_options``: further lines of the job file."""
        self._directory = directory
        self._report = report
        self._rows, self._files = found.rows, found.files
        self._given_up = -1
        """The files known to the row behind which the last ones were deleted."""
        self._journal = journal
        self._options = fio_options
        self._stop = threading.Event()
        self._done = Path(tempfile.mkdtemp())
        self._fio: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        """Starts both writers."""
        for path in self._files_there():
            if int(path.suffix[1:]) > self._files:
                path.unlink()  # begun, and not finished before the power went
        self._fio = self._start_fio()
        self._thread.start()

    def stop(self) -> Found:
        """Ends both; what is complete."""
        assert self._fio is not None
        self._stop.set()
        self._thread.join(STOP_S)
        assert not self._thread.is_alive(), "a transaction hangs"
        self._fio.terminate()
        self._fio.wait(STOP_S)
        return Found(self._rows, self._files)

    def _start_fio(self) -> subprocess.Popen[bytes]:
        lines = [_GLOBAL, f"directory={self._directory}", "do_verify=0", "end_fsync=1"]
        lines += ["fallocate=none", self._options]
        for number in range(self._files + 1, self._files + FILES_PER_RUN + 1):
            lines += [f"[{number}]", "stonewall", f"filename=fio.{number}", f"randseed={number}"]
            # Run once its fsync has returned.
            lines += [f"exec_postrun=: > {self._done}/{number}"]
        job = self._done / "job"
        job.write_text("\n".join(lines) + "\n")
        return subprocess.Popen(
            ["fio", f"--output={self._done}/out", str(job)],
            cwd=self._done,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )

    def _work(self) -> None:
        try:
            base = self._open()
            while not self._stop.is_set():
                self._transaction(base)
            base.close()
        except Exception as error:
            self._report({"failure": f"the load: {error!r}"})

    def _open(self) -> sqlite3.Connection:
        base = sqlite3.connect(self._directory / DATABASE, isolation_level=None)
        base.execute(f"PRAGMA journal_mode={self._journal}")
        # With the write-ahead log FULL is what syncs each commit, with a journal to delete EXTRA.
        base.execute(f"PRAGMA synchronous={'FULL' if self._journal == 'wal' else 'EXTRA'}")
        base.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
        base.executescript(
            "BEGIN;"
            "CREATE TABLE IF NOT EXISTS rows (n INTEGER PRIMARY KEY, files INTEGER, payload BLOB);"
            "CREATE TABLE IF NOT EXISTS slots (slot INTEGER PRIMARY KEY, n INTEGER);"
            "COMMIT;"
        )
        return base

    def _transaction(self, base: sqlite3.Connection) -> None:
        assert self._fio is not None
        while (self._done / str(self._files + 1)).exists():
            self._files += 1
            self._report({"files": self._files})
        if self._fio.poll() is not None:
            raise AssertionError(f"fio ended: {(self._done / 'out').read_text()[-500:]}")
        number, files = self._rows + 1, self._files
        base.execute("BEGIN IMMEDIATE")
        base.execute("INSERT INTO rows VALUES (?, ?, ?)", (number, files, payload(number)))
        base.execute("INSERT OR REPLACE INTO slots VALUES (?, ?)", (number % SLOTS, number))
        base.execute("COMMIT")
        self._rows = number
        self._report({"rows": number})
        if files != self._given_up:
            # The row is durable, and it gives the older files up.
            for path in self._files_there():
                if int(path.suffix[1:]) <= files - KEEP:
                    path.unlink()
            self._given_up = files

    def _files_there(self) -> list[Path]:
        return list(self._directory.glob("fio.*"))


def freeze(directory: Path, frozen: bool) -> None:
    """Stops all writing to the file system of ``directory``, or lets it go on."""
    import fcntl

    freeze_request, thaw_request = 0xC0045877, 0xC0045878
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(fd, freeze_request if frozen else thaw_request, 0)
    finally:
        os.close(fd)
