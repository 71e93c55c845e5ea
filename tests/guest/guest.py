"""One throw-away guest: starts QEMU, runs a job in it, answers the job, ends it.

Owns: the QEMU process, the file-share daemon, the control line (a serial port: the job writes
``host WORDS``, the host answers ``CODE TEXT``; ``exit CODE`` ends the job). The guest sees the
host's files read-only under a layer of its own memory, and the host's loopback as 10.0.2.2;
no other network. TCG only: a test's result must not depend on the machine's virtualisation.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.qmp import Qmp
from tests.guest.initrd import initrd
from tests.guest.kernel import TREE, kernel

HERE = Path(__file__).resolve().parent
HOST_ADDRESS = "10.0.2.2"
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
MEMORY_MIB = 1536
START_S = 30.0
Answer = Callable[[list[str]], str | None]


class GuestError(AssertionError):
    """The guest or its job did not do what the test needs; carries the end of the serial log."""


@dataclass(frozen=True)
class Disk:
    """A file that the guest sees as a virtio disk: vda, vdb, ... in order.

    ``serial``: the number that it tells. ``trace``: an empty file to which QEMU logs each write and
    flush in its order (the format of its ``blklogwrites``)."""

    path: Path
    read_only: bool = False
    trace: Path | None = None
    serial: str = ""


@dataclass(frozen=True)
class Outcome:
    """How it ended: the job's exit code, or None after a power cut; what the guest printed."""

    code: int | None
    serial: str
    seconds: float

    def check(self) -> Outcome:
        """Itself, if the job succeeded; GuestError if not."""
        if self.code != 0:
            raise GuestError(f"the job ended with {self.code}\n{tail(self.serial)}")
        return self


def tail(text: str, lines: int = 60) -> str:
    """The last lines."""
    return "\n".join(text.splitlines()[-lines:])


def _refuse(words: list[str]) -> str | None:
    raise GuestError(f"the job asks the host for {words}, and nobody answers")


class Guest:
    """A context manager from switch-on to switch-off."""

    def __init__(
        self,
        job: Path,
        *,
        disks: Sequence[Disk] = (),
        environment: Mapping[str, str] | None = None,
        answer: Answer = _refuse,
        forwards: Mapping[int, int] | None = None,
        flavour: str | None = None,
        echo: bool = False,
    ) -> None:
        """``forwards``: ports of the host's loopback that lead to ports of the guest.

        ``answer`` is called with the words of each ``host WORDS`` of the job and may take its
        time; what it returns is printed in the guest, what it raises fails the test. ``host
        power-cut`` is answered here: the guest is gone without a chance to write anything."""
        self._kernel = kernel(flavour)
        self._answer = answer
        self._echo = echo
        self._forwards = dict(forwards or {})
        self._processes: list[subprocess.Popen[bytes]] = []
        self._directory = Path(tempfile.mkdtemp(prefix="guest-"))
        self._serial = self._directory / "serial.log"
        self._line = b""
        self._control: socket.socket | None = None
        try:
            self._start(job, disks, {"PYTHON": sys.executable, **(environment or {})})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process and removes every file; a running guest loses its power."""
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        if self._control is not None:
            self._control.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def alive(self) -> bool:
        """Whether QEMU runs."""
        return self._processes[-1].poll() is None

    def halt(self) -> None:
        """Stops the processors; returns when what the disks had been given is in their files."""
        monitor = Qmp(self._directory / "monitor")
        try:
            monitor.execute("stop")
        finally:
            monitor.close()

    def power_cut(self) -> None:
        """Kills QEMU: what the guest did not write to its disks is lost. From any thread."""
        self._processes[-1].kill()

    def wait(self, seconds: float) -> Outcome:
        """Serves the job until it ends; GuestError when the time is over."""
        began = time.monotonic()
        qemu = self._processes[-1]
        death = os.pidfd_open(qemu.pid)
        code: int | None = None
        try:
            while True:
                left = began + seconds - time.monotonic()
                sources = [death] if self._control is None else [self._control.fileno(), death]
                ready, _, _ = select.select(sources, [], [], max(left, 0))
                if not ready:
                    raise GuestError(f"not done after {seconds:g} s\n{tail(self.serial)}")
                if ready == [death]:
                    break
                if (line := self._read_line()) is None:
                    continue
                kind, *words = shlex.split(line)
                if kind == "exit":
                    code = int(words[0])
                else:
                    self._serve(words)
        finally:
            os.close(death)
        text = self.serial
        if code is None and qemu.wait() >= 0:
            raise GuestError(f"the guest died without a word\n{self.complaints()}\n{tail(text)}")
        return Outcome(code, text, time.monotonic() - began)

    @property
    def serial(self) -> str:
        """What the guest has printed so far."""
        return self._serial.read_text(errors="replace").replace("\r", "")

    # -- the control line ------------------------------------------------------------------------

    def _read_line(self) -> str | None:
        """The next complete line, or None if there is none yet."""
        assert self._control is not None
        data = b""
        with contextlib.suppress(ConnectionResetError):
            data = self._control.recv(4096)
        if not data:
            # QEMU is about to end: nothing but that is waited for from here on.
            self._control.close()
            self._control = None
            return None
        self._line += data
        head, end, rest = self._line.partition(b"\n")
        if not end:
            return None
        assert not rest, "the job sends one line and waits for the answer"
        self._line = b""
        return head.decode()

    def _serve(self, words: list[str]) -> None:
        if self._echo:
            print(f"host: {shlex.join(words)}", flush=True)
        if words == ["power-cut"]:
            self.power_cut()
            return
        text = self._answer(words) or ""
        assert "\n" not in text, "an answer is one line"
        assert self._control is not None
        self._control.sendall(f"0 {text}\n".encode())

    # -- start -----------------------------------------------------------------------------------

    def _start(self, job: Path, disks: Sequence[Disk], environment: Mapping[str, str]) -> None:
        exports = "".join(f"export {k}={shlex.quote(v)}\n" for k, v in environment.items())
        content = {
            "environment.sh": (0o644, exports.encode()),
            "prelude.sh": (0o644, (HERE / "prelude.sh").read_bytes()),
            "job.sh": (0o644, job.read_bytes()),
        }
        initial = self._directory / "initrd"
        initial.write_bytes(initrd(self._kernel, content))
        self._serial.touch()
        argv = [*self._machine(initial), *self._share(), *self._disks(disks)]
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self._directory / "control"))
            listener.listen(1)
            listener.settimeout(START_S)
            self._spawn("qemu", argv)
            try:
                self._control, _ = listener.accept()
            except TimeoutError:
                raise GuestError(f"QEMU does not start\n{self.complaints()}") from None

    def _machine(self, initial: Path) -> list[str]:
        parameters = (
            "console=ttyS0 loglevel=4 panic=-1 nokaslr mitigations=off tsc=reliable "
            f"no_timer_check share={self._kernel.share} tree={TREE} modules={self._kernel.modules}"
        )
        console = f"logfile={self._serial}" if self._echo else f"path={self._serial}"
        network = ["user", "id=net"]
        network += [f"hostfwd=tcp:127.0.0.1:{on}-:{to}" for on, to in self._forwards.items()]
        return [
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"),
            *("-m", str(MEMORY_MIB), "-nodefaults", "-display", "none", "-no-reboot"),
            *("-kernel", str(self._kernel.image), "-initrd", str(initial), "-append", parameters),
            *("-chardev", f"{'stdio' if self._echo else 'file'},id=console,{console}"),
            *("-serial", "chardev:console"),
            *("-chardev", f"socket,id=control,path={self._directory}/control"),
            *("-serial", "chardev:control"),
            *("-qmp", f"unix:{self._directory}/monitor,server=on,wait=off"),
            *("-netdev", ",".join(network), "-device", "virtio-net-pci,netdev=net,romfile="),
            *("-device", "virtio-rng-pci"),
        ]

    def _share(self) -> list[str]:
        """The arguments that show the host's root directory; starts the daemon that needs."""
        if self._kernel.share == "9p":
            return [
                *("-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"),
                *("-device", "virtio-9p-pci,fsdev=host,mount_tag=host"),
            ]
        path = self._directory / "virtiofs"
        # The host's files stay as they are while a guest looks at them, and to keep them in its
        # page cache more than halves what starting a program costs: code that is read anew is
        # translated anew.
        options = ["-o", "source=/", "-o", "cache=always", "-o", "sandbox=chroot", "-f"]
        self._spawn("virtiofsd", [VIRTIOFSD, f"--socket-path={path}", *options])
        end = time.monotonic() + START_S
        while not path.exists():
            if time.monotonic() > end or self._processes[-1].poll() is not None:
                raise GuestError(f"virtiofsd does not start\n{self.complaints()}")
            time.sleep(0.02)
        return [
            *("-object", f"memory-backend-memfd,id=memory,size={MEMORY_MIB}M,share=on"),
            *("-numa", "node,memdev=memory"),
            *("-chardev", f"socket,id=files,path={path}"),
            *("-device", "vhost-user-fs-pci,chardev=files,tag=host"),
        ]

    def _disks(self, disks: Sequence[Disk]) -> list[str]:
        argv = []
        for number, disk in enumerate(disks):
            if disk.trace is not None:
                argv += _traced(number, disk.path, disk.trace)
                continue
            options = f"file={disk.path},format=raw,if=none,id=disk{number},discard=unmap"
            if disk.read_only:
                # Somebody else may have the file open, and write to it.
                options += ",readonly=on,file.locking=off"
            device = f"virtio-blk-pci,drive=disk{number},serial={disk.serial}"
            argv += ["-drive", options, "-device", device]
        return argv

    def _spawn(self, name: str, argv: Sequence[str]) -> None:
        terminal = self._echo and name == "qemu"
        with contextlib.ExitStack() as stack:
            path = self._directory / f"{name}.out"
            output = None if terminal else stack.enter_context(path.open("wb"))
            self._processes.append(
                subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
                )
            )

    def complaints(self) -> str:
        """How QEMU ended, if it did, and what it and the file-share daemon printed."""
        code = self._processes[-1].poll()
        words = [] if code is None else [f"qemu ended with {code}"]
        for path in sorted(self._directory.glob("*.out")):
            words.append(f"{path.stem}: {path.read_text(errors='replace')}")
        return "\n".join(words)


def _traced(number: int, path: Path, trace: Path) -> list[str]:
    # The host stays up, so nothing is gained by syncing there; the trace has the flushes. A trace
    # is not replayed with discards in it, so the disk offers none.
    files = {"image": path, "trace": trace}
    return [
        *(
            word
            for name, file in files.items()
            for word in (
                "-blockdev",
                f"driver=file,node-name={name}{number},filename={file},cache.no-flush=on",
            )
        ),
        "-blockdev",
        f"driver=blklogwrites,node-name=disk{number},file=image{number},log=trace{number},"
        "log-sector-size=512",
        *("-device", f"virtio-blk-pci,drive=disk{number},discard=off,write-zeroes=off"),
    ]


def run(
    job: str,
    seconds: float,
    *,
    disks: Sequence[Disk] = (),
    environment: Mapping[str, str] | None = None,
    answer: Answer = _refuse,
) -> Outcome:
    """Runs ``jobs/JOB.sh`` to its end in a guest of its own."""
    path = HERE / "jobs" / f"{job}.sh"
    with Guest(path, disks=disks, environment=environment, answer=answer) as guest:
        return guest.wait(seconds)
