"""The clients that tests run against an export: fio, libnbd, nbdcopy, qemu-img and friends.

Owns: their command lines, their output, their time-outs. Knows NBD URIs and files, nothing of
nbdmirror. Used by the integration tests and by ``tests.bench``.
"""

from __future__ import annotations

import importlib
import json
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import pytest

TIMEOUT_S = 120.0
Json = dict[str, Any]


def requires(*programs: str) -> pytest.MarkDecorator:
    """Skips a test where one of these programs is not installed."""
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def run(*argv: str, timeout: float = TIMEOUT_S, code: int | None = 0) -> str:
    """Runs a client and returns its output; its exit code must be ``code`` (None: any)."""
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert code is None or done.returncode == code, (
        f"{' '.join(argv)} -> {done.returncode}\n{done.stdout}{done.stderr}"
    )
    return done.stdout


def run_json(*argv: str) -> Any:
    """Runs a client whose output is JSON."""
    return json.loads(run(*argv))


def connect(uri: str, *, contexts: Sequence[str] = (), strict: bool = True) -> Any:
    """A libnbd handle, connected. Not strict: it sends what a correct client never would."""
    nbd = importlib.import_module("nbd")
    handle = nbd.NBD()
    for context in contexts:
        handle.add_meta_context(context)
    if not strict:
        handle.set_strict_mode(0)
    handle.connect_uri(uri)
    return handle


def extents(handle: Any, context: str, length: int, offset: int = 0) -> list[tuple[int, int]]:
    """(length, flags) of a meta context over a range, neighbours with equal flags merged."""
    merged: list[tuple[int, int]] = []
    end = offset + length

    def collect(name: str, start: int, entries: list[int], _error: int) -> int:
        nonlocal offset
        if name != context:
            return 0
        assert start == offset, "a reply begins where the request does"
        for size, flags in zip(entries[::2], entries[1::2], strict=True):
            size = min(size, end - offset)
            offset += size
            if merged and merged[-1][1] == flags:
                size += merged.pop()[0]
            merged.append((size, flags))
        return 0

    while offset < end:
        before = offset
        handle.block_status(end - offset, offset, collect)
        assert offset > before, f"{context}: no extent at {before}"
    return merged


def pattern(length: int, seed: int) -> bytes:
    """Bytes that no other seed gives and no compression makes small."""
    return random.Random(seed).randbytes(length)


def fio_argv(uri: str, directory: Path, **options: object) -> list[str]:
    """The command line of one fio job over NBD; option names with ``_`` as fio has them."""
    argv = [
        "fio",
        "--name=job",
        "--ioengine=nbd",
        f"--uri={uri}",
        "--output-format=json",
        f"--aux-path={directory}",
        "--eta=never",
    ]
    return argv + [
        f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items()
    ]


def fio_result(output: str) -> Json:
    """The first job of fio's JSON, which begins after lines that are not JSON."""
    start = output.find("{\n")
    assert start >= 0, f"fio printed no JSON:\n{output[-2000:]}"
    report: Json = json.loads(output[start:])
    job: Json = report["jobs"][0]
    assert job["error"] == 0, f"fio saw error {job['error']}"
    return job


class Fio:
    """fio in the background: started now, result later."""

    def __init__(self, uri: str, directory: Path, **options: object) -> None:
        # Verify state files would end up in the current directory.
        argv = fio_argv(uri, directory, verify_state_save=0, **options)
        self.popen = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=directory,
        )

    @property
    def running(self) -> bool:
        """Whether it still works."""
        return self.popen.poll() is None

    def result(self, timeout: float = TIMEOUT_S) -> Json:
        """Waits for the end; fails on any I/O or verify error. fio can spin: it is bounded."""
        try:
            output, _ = self.popen.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"fio did not end within {timeout:g} s") from None
        assert self.popen.returncode == 0, f"fio -> {self.popen.returncode}\n{output[-4000:]}"
        return fio_result(output)

    def kill(self) -> None:
        """Ends it."""
        self.popen.kill()
        self.popen.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.running:
            self.kill()


def fio(uri: str, directory: Path, *, timeout: float = TIMEOUT_S, **options: object) -> Json:
    """Runs one fio job to its end and returns its part of the report."""
    return Fio(uri, directory, **options).result(timeout)


def nbd_error() -> Any:
    """The class of libnbd's errors; their ``errno`` attribute is the symbol, as a string."""
    return importlib.import_module("nbd").Error


class Writer:
    """A client that writes stamped 4 KiB blocks, one at a time, and keeps the slowest's time;
    ``rate``: about so many bytes a second, less if that is too fast.

    A context manager; leaving it stops the writing and raises what the client saw.
    """

    def __init__(
        self,
        uri: str,
        *,
        seed: int = 1,
        blocks: int = 1024,
        offset: int = 0,
        rate: float | None = None,
    ) -> None:
        self._uri = uri
        self._pause_s = 4096 / rate if rate else 0.0
        self._random = random.Random(seed)
        self._blocks = blocks
        self._offset = offset
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)
        self._error: BaseException | None = None
        self.writes = 0
        self.slowest_s = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_exc: object) -> None:
        self._stop.set()
        self._thread.join(TIMEOUT_S)
        assert kind is not None or not self._thread.is_alive(), "a write hangs"
        if kind is None and self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            handle = connect(self._uri)
            due = time.monotonic()
            while not self._stop.is_set():
                block = self._random.randrange(self._blocks)
                data = self._random.randbytes(4096)
                began = time.monotonic()
                handle.pwrite(data, self._offset + block * 4096)
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                self.writes += 1
                due += self._pause_s
                self._stop.wait(max(0.0, due - time.monotonic()))
            handle.shutdown()
        except (nbd_error(), AssertionError, OSError) as error:
            self._error = error
