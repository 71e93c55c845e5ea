"""What only the real world has: modes, stale sockets, short system calls, block devices."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from nbdmirror.codec.batchpure import PLACE
from nbdmirror.config import KIB, MIB
from nbdmirror.edge import _scatter, files, scatterpure, zeroing
from nbdmirror.edge.clock import LinuxClock
from nbdmirror.edge.files import LinuxDisk
from nbdmirror.edge.journal import KEPT_BYTES_MAX, Journal
from nbdmirror.edge.net import LinuxNetwork
from nbdmirror.edge.sockets import TcpAddress, UnixAddress, parse_address
from nbdmirror.errors import ConfigError
from tests.contract.network_contract import Peer


@pytest.fixture
def disk() -> Iterator[LinuxDisk]:
    made = LinuxDisk(threads_max=2)
    yield made
    made.close()


def test_files_and_directories_are_private(disk: LinuxDisk, tmp_path: Path) -> None:
    disk.make_directory(f"{tmp_path}/a/b")
    disk.open(f"{tmp_path}/a/b/file", create=True).close()
    assert stat.S_IMODE(os.stat(f"{tmp_path}/a").st_mode) == 0o700
    assert stat.S_IMODE(os.stat(f"{tmp_path}/a/b").st_mode) == 0o700
    assert stat.S_IMODE(os.stat(f"{tmp_path}/a/b/file").st_mode) == 0o600


def test_a_fifo_is_refused_and_does_not_stall(disk: LinuxDisk, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError) as caught:
        disk.open(f"{tmp_path}/fifo", read_only=True)
    assert caught.value.errno == errno.EINVAL


def test_a_disk_that_hangs_holds_up_no_other_one(
    disk: LinuxDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M8, I8: more reads than there are threads for one device wait for it for ever."""
    shm = Path("/dev/shm") / f"nbdmirror-{os.getpid()}"
    if tmp_path.stat().st_dev == shm.parent.stat().st_dev:
        pytest.skip("no second file system to be had")
    answers = threading.Event()

    def pread(fd: int, length: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{fd}") == str(tmp_path / "hangs"):
            answers.wait()
        return os.pread(fd, length, offset)

    monkeypatch.setattr(files, "pread", pread)

    async def scenario() -> None:
        hangs = disk.open(f"{tmp_path}/hangs", create=True)
        hangs.pwrite(0, bytes(4096))
        well = disk.open(str(shm), create=True)
        well.pwrite(0, b"well" * 1024)
        waiting = [asyncio.ensure_future(hangs.read(0, 4096)) for _ in range(5)]
        try:
            assert await asyncio.wait_for(well.read(0, 4), 30) == b"well"
            await asyncio.wait_for(well.sync(), 30)
            assert not any(read.done() for read in waiting)
        finally:
            answers.set()
            await asyncio.gather(*waiting)
            hangs.close()
            well.close()
            shm.unlink()

    asyncio.run(scenario())


def test_short_writes_go_on_and_no_progress_is_enospc(
    disk: LinuxDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 10: the kernel may take a part of a write."""
    file = disk.open(f"{tmp_path}/file", create=True)
    for module in (files, scatterpure):
        monkeypatch.setattr(module, "pwrite", lambda fd, data, at: os.pwrite(fd, data[:100], at))
    monkeypatch.setattr(files, "pwritev", lambda fd, parts, at: os.pwrite(fd, parts[0], at))
    file.pwrite(3, b"a" * 1234)
    file.pwritev(2000, [b"b" * 10, b"c" * 20, b"d" * 300])
    assert file.pread(3, 1234) == b"a" * 1234
    assert file.pread(2000, 330) == b"b" * 10 + b"c" * 20 + b"d" * 300
    for module in (files, scatterpure):
        monkeypatch.setattr(module, "pwrite", lambda fd, data, at: 0)
    with pytest.raises(OSError) as caught:
        file.pwrite(0, b"e")
    assert caught.value.errno == errno.ENOSPC
    file.close()


def test_clearing_falls_back_to_writing_zeros(
    disk: LinuxDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_args: object) -> int:
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    monkeypatch.setattr(zeroing, "_fallocate", unsupported)
    file = disk.open(f"{tmp_path}/file", create=True)
    file.pwrite(0, b"x" * 3 * MIB)
    asyncio.run(file.punch(100, 2 * MIB))
    asyncio.run(file.zero(3 * MIB - 5, 5))
    assert file.pread(0, 3 * MIB) == b"x" * 100 + bytes(2 * MIB) + b"x" * (MIB - 105) + bytes(5)
    assert file.size() == 3 * MIB
    file.close()


def test_try_pread_gives_up_where_it_is_not_offered(
    disk: LinuxDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_args: object) -> bytes:
        raise OSError(errno.EOPNOTSUPP, "no")

    file = disk.open(f"{tmp_path}/file", create=True)
    file.pwrite(0, b"data")
    monkeypatch.setattr(files, "pread_cached", unsupported)
    assert file.try_pread(0, 4) is None
    monkeypatch.undo()
    assert file.try_pread(0, 4) is None, "remembered"
    file.close()


def test_try_pread_wants_all_of_it(
    disk: LinuxDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel answers with the part that is in memory: that is not yet an answer."""
    file = disk.open(f"{tmp_path}/file", create=True)
    file.pwrite(0, b"d" * 8192)
    monkeypatch.setattr(files, "pread_cached", lambda *_args: b"d" * 4096)
    assert file.try_pread(0, 8192) is None
    assert file.try_pread(4096, 4096) == b"d" * 4096
    file.close()


FORMS = [scatterpure, _scatter]


@pytest.mark.parametrize("form", FORMS, ids=["plain", "compiled"])
def test_both_forms_read_what_is_cached(form: ModuleType, tmp_path: Path) -> None:
    """X4: whole, short at the end, nothing behind it, and an error with its number."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)
    fd = os.open(path, os.O_RDWR)
    try:
        assert form.pread_cached(fd, 8192, 256) == bytes(range(256)) * 32
        assert form.pread_cached(fd, 8192, 63 * 256) == bytes(range(256))
        assert form.pread_cached(fd, 8192, 64 * 256) == b""
        assert form.pread_cached(fd, 0, 0) == b""
    finally:
        os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        form.pread_cached(fd, 1, 0)


@pytest.mark.parametrize("form", FORMS, ids=["plain", "compiled"])
def test_both_forms_write_to_places(form: ModuleType, tmp_path: Path) -> None:
    """Those of one volume only."""
    path = tmp_path / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        places = [(0, 0, 4, 7), (8, 4, 2, 7), (4, 4, 4, 6)]
        form.pwrite_places(fd, b"abcdefgh", b"".join(PLACE.pack(*one) for one in places), 7)
    finally:
        os.close(fd)
    assert path.read_bytes() == b"abcd" + bytes(4) + b"ef"


def test_a_directory_is_synced_once_for_all_who_ask_together(
    disk: LinuxDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """O18: and by a sync that began after each of them asked; 200 maps share theirs at a start."""
    synced: list[int] = []
    asked: list[int] = []

    def fsync(fd: int) -> None:
        synced.append(len(asked))
        os_fsync(fd)

    os_fsync = os.fsync
    monkeypatch.setattr(os, "fsync", fsync)

    async def ask(number: int) -> None:
        asked.append(number)
        before = len(asked)
        await disk.sync_directory(str(tmp_path))
        assert synced[-1] >= before, "the sync that it waited for began before it asked"

    async def everybody() -> None:
        await asyncio.gather(*(ask(number) for number in range(50)))

    asyncio.run(everybody())
    assert 1 <= len(synced) <= 2


def test_close_waits_for_the_threads(
    disk: LinuxDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A descriptor closed under a running fdatasync could by then be another file's. So the file
    is claimed until that has ended."""
    entered, go_on = threading.Event(), threading.Event()
    synced: list[tuple[int, int]] = []

    def slow(fd: int) -> None:
        entered.set()
        assert go_on.wait(10)
        os.fdatasync(fd)
        synced.append((fd, os.fstat(fd).st_ino))

    async def main() -> None:
        file = disk.open(f"{tmp_path}/file", create=True)
        task = asyncio.ensure_future(file.sync())
        await asyncio.to_thread(entered.wait, 10)
        file.close()
        with pytest.raises(BlockingIOError):
            disk.open(f"{tmp_path}/file")
        other = disk.open(f"{tmp_path}/other", create=True)
        go_on.set()
        await task
        other.close()

    monkeypatch.setattr(files, "fdatasync", slow)
    asyncio.run(main())
    ((fd, inode),) = synced
    assert inode == os.stat(tmp_path / "file").st_ino
    with pytest.raises(OSError):
        os.fstat(fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="a loop device needs root")
@pytest.mark.skipif(shutil.which("losetup") is None, reason="needs losetup")
def test_block_device(disk: LinuxDisk, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * MIB)
    made = subprocess.run(
        ["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        file = disk.open(device)
        assert file.block_device and file.size() == MIB
        with pytest.raises(BlockingIOError) as caught:  # which is waited for, as with a file
            disk.open(device)
        assert caught.value.errno == errno.EBUSY, "claimed"
        file.pwrite(5, b"hello")
        asyncio.run(file.punch(64 * KIB, 64 * KIB))
        asyncio.run(file.zero(256 * KIB + 3, 1000))
        asyncio.run(file.sync())
        expected = bytearray(b"x" * MIB)
        expected[5:10] = b"hello"
        expected[64 * KIB : 128 * KIB] = bytes(64 * KIB)
        expected[256 * KIB + 3 : 256 * KIB + 1003] = bytes(1000)
        assert file.pread(0, MIB) == expected
        assert list(file.data_ranges(0, MIB)) == [(0, MIB)]
        with pytest.raises(OSError):
            file.pwrite(MIB - 1, b"ab")
        with pytest.raises(OSError):
            file.truncate(5)
        file.close()
        assert image.read_bytes()[: MIB - 1] == expected[: MIB - 1]
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_clock() -> None:
    clock = LinuxClock()
    assert clock.time_ns() > 1_700_000_000 * 10**9
    assert clock.boot_id() == LinuxClock().boot_id() == str(uuid.UUID(clock.boot_id()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tcp:127.0.0.1:10809", TcpAddress("127.0.0.1", 10809)),
        ("tcp:[::1]:0", TcpAddress("::1", 0)),
        ("tcp:db.example:1", TcpAddress("db.example", 1)),
        ("unix:/run/a b.sock", UnixAddress("/run/a b.sock")),
    ],
)
def test_addresses(text: str, expected: TcpAddress | UnixAddress) -> None:
    assert parse_address(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "h:1", "udp:h:1", "tcp", "tcp:host", "tcp:host:", "tcp::1", "tcp:h:x", "tcp:h:65536"),
        *("tcp:::1:1", "tcp:h:²", "unix:", "unix:relative", "unix:/" + "x" * 107),
    ],
)
def test_addresses_that_are_none(text: str) -> None:
    """I9: a clear error."""
    with pytest.raises(ConfigError) as caught:
        parse_address(text)
    assert text in str(caught.value)


def test_unix_listener_owns_its_name(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")

    async def main() -> None:
        listener = await LinuxNetwork().listen(f"unix:{path}", Peer)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
        listener.close()
        assert not os.path.exists(path)
        listener.close()
        listener = await LinuxNetwork().listen(f"unix:{path}", Peer)
        os.unlink(path)
        Path(path).write_text("somebody else's")
        listener.close()
        assert Path(path).read_text() == "somebody else's"

    asyncio.run(main())


def test_a_stale_socket_is_taken_over_and_other_files_are_not(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)

    async def main() -> None:
        listener = await LinuxNetwork().listen(f"unix:{path}", Peer)
        peer = Peer()
        transport = await LinuxNetwork().connect(f"unix:{path}", lambda: peer)
        transport.close()
        await peer.until(peer.lost.is_set)
        listener.close()
        Path(path).write_text("data")
        with pytest.raises(OSError) as caught:
            await LinuxNetwork().listen(f"unix:{path}", Peer)
        assert caught.value.errno == errno.EEXIST
        assert Path(path).read_text() == "data"

    asyncio.run(main())


def test_tcp_options_on_both_ends() -> None:
    """Fault 18: a peer that is gone without a word is found out."""
    accepted: list[Peer] = []

    def accept() -> Peer:
        accepted.append(Peer())
        return accepted[-1]

    async def main() -> None:
        listener = await LinuxNetwork().listen("tcp:127.0.0.1:0", accept)
        client = Peer()
        await LinuxNetwork().connect(listener.address, lambda: client)
        while not accepted:
            await asyncio.sleep(0)
        await accepted[0].made.wait()
        for peer in (client, accepted[0]):
            sock = peer.transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10
        for peer in (client, accepted[0]):
            peer.transport.abort()
            await peer.until(peer.lost.is_set)
        listener.close()

    asyncio.run(main())


def test_a_host_that_does_not_exist_is_named() -> None:
    async def main() -> None:
        with pytest.raises(OSError) as caught:
            await LinuxNetwork().connect("tcp:host.invalid:1", Peer)
        assert caught.value.errno == errno.EHOSTUNREACH
        assert "tcp:host.invalid:1" in str(caught.value)

    asyncio.run(main())


def test_a_range_that_is_punched_while_it_is_looked_at_is_none(
    disk: LinuxDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """O22: between SEEK_DATA and SEEK_HOLE; a piece of no length would be a defect in a reply."""
    file = disk.open(f"{tmp_path}/file", create=True)
    file.pwrite(0, b"1" * MIB)
    seek, punched = os.lseek, list[int]()

    def race(fd: int, offset: int, whence: int) -> int:
        if whence == os.SEEK_HOLE and not punched:
            punched.append(offset)
            return offset
        return seek(fd, offset, whence)

    monkeypatch.setattr(os, "lseek", race)
    assert list(file.data_ranges(0, MIB)) == [(0, MIB)] and punched == [0]
    file.close()


def test_who_tells_of_what_happened_goes_on_where_nobody_can_be_told() -> None:
    """I8: the journal's disk is full."""
    full = os.open("/dev/full", os.O_WRONLY)
    journal = Journal(full)
    journal.say("disconnected")
    assert journal.flush(5)
    os.close(full)


@pytest.mark.parametrize("blocking", [True, False])
def test_a_journal_that_nobody_reads_keeps_nobody_waiting(blocking: bool) -> None:
    """I8: the pipe is open, and full. What is kept has its bound (I6); what is beyond that is
    counted, and told once somebody reads. ``blocking``: not where a program that shares our
    stderr has made it so; lines were lost, and one cut, without a word."""
    out, into = os.pipe()
    os.set_blocking(into, blocking)
    room = fcntl.fcntl(into, fcntl.F_GETPIPE_SZ)
    os.write(into, b"-" * room)
    journal = Journal(into)
    for number in range(3000):
        journal.say(f"{number:999}")
    assert not journal.flush(0.1)
    read = bytearray()

    def collect() -> None:
        while piece := os.read(out, MIB):
            read.extend(piece)

    reader = threading.Thread(target=collect)
    reader.start()
    assert journal.flush(10)
    journal.say("once more")
    assert journal.flush(10)
    os.close(into)
    reader.join()
    os.close(out)
    *lines, told, last = read[room:].decode().splitlines()
    assert list(map(int, lines)) == list(range(KEPT_BYTES_MAX // 1000))
    assert told.startswith(f"journal-full {3000 - len(lines)} lines") and last == "once more"


def test_a_closed_standard_stream_is_no_file_of_ours(tmp_path: Path) -> None:
    """``serve 2>&-``: the next file that was opened, a state directory's lock, would have got the
    lines for the journal. A program that we start has the same."""
    seen = tmp_path / "seen"
    script = (
        "import os; from nbdmirror.edge.env import hold_standard_streams as hold; hold();"
        f"print(os.readlink('/proc/self/fd/2'), file=open('{seen}', 'w'), flush=True);"
        f"os.system('readlink /proc/$$/fd/2 >> {seen}')"
    )
    argv = ["/bin/sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, script]
    subprocess.run(argv, check=True)
    assert seen.read_text().split() == ["/dev/null"] * 2
