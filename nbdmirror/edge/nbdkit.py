"""The nbdkit front end: a supervisor that keeps one nbdkit process, with the node in it, running.

Owns the NBD listening sockets (they, and connections that wait in them, survive an nbdkit that
aborts), the nbdkit process, and what the service manager hears. Never opens the node's state: that
is ``nbdkit_plugin``'s, inside nbdkit. Called by ``edge.daemon.serve``.

nbdkit is started with its sockets passed in (socket activation; it never forks then). One that
ends unasked is started again, with a line in the journal and an event in the node, at most
``RESTARTS_MAX`` times in ``RESTARTS_SECONDS``. One that says why it cannot serve is not.

nbdkit writes to its stderr itself, from the thread that has the interpreter: were that the journal,
one that nobody reads would stop the node (I8). So it is a pipe to us, which is always read.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nbdmirror
from nbdmirror.config import Config
from nbdmirror.edge import env as world
from nbdmirror.edge import signals
from nbdmirror.edge.journal import STDERR
from nbdmirror.edge.lock import exclusive
from nbdmirror.edge.nbdkit_bridge import RESTARTED, SUPERVISOR_FD, SUPERVISOR_PID
from nbdmirror.edge.net import LinuxNetwork
from nbdmirror.edge.notify import WATCHDOG, keep_alive, notify
from nbdmirror.edge.secrets import check_secret
from nbdmirror.edge.security import check_security
from nbdmirror.edge.sockets import FIRST_FD, HANDED_ON, Sockets
from nbdmirror.errors import ConfigError, NbdmirrorError
from nbdmirror.ports import Listener

RESTARTS_MAX = 5
RESTARTS_SECONDS = 60.0
LISTEN_MAX = 16
"""Sockets that nbdkit takes over."""
LINE_MAX = 1 << 16
"""Of what nbdkit says: what is longer goes to the journal in pieces."""

PLUGIN = Path(__file__).with_name("nbdkit_plugin.py")
_HIGH_FD = 32  # above all numbers that the sockets get in nbdkit
_INSTALL = 'install nbdkit and its Python plugin, or set nbd.frontend = "native"'
# The node in nbdkit gives its signs of life through us, so the watchdog's time is passed on. The
# library is that of our Python.
_NOT_PASSED_ON = ("NOTIFY_SOCKET", "WATCHDOG_PID", "PYTHONHOME")


def supervise(config: Config, sockets: Sockets) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code.

    ConfigError if nbdkit cannot be used here; else whatever ended the node."""
    if len(config.nbd.listen) > LISTEN_MAX:
        raise ConfigError(
            f"{config.path}: nbd.listen has {len(config.nbd.listen)} addresses; nbdkit takes at "
            f"most {LISTEN_MAX}"
        )
    program = _find_nbdkit()
    check_security(config)
    with exclusive(config.state_dir):
        pass  # an nbdkit whose supervisor was killed has gone, with its sockets
    world.run(Supervisor(config, program, sockets).run())
    return 0


def _find_nbdkit() -> str:
    """The program; ConfigError unless it has a Python plugin of this version of Python."""
    program = shutil.which("nbdkit")
    if program is None:
        raise ConfigError("there is no nbdkit on this machine", hint=_INSTALL)
    done = subprocess.run(
        [program, "python", "--dump-plugin"],
        capture_output=True,
        text=True,
        check=False,
        env=_environment(program),
    )
    facts = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    version = facts.get("python_version")
    if version is None:
        raise ConfigError(f"{program} has no Python plugin: {done.stderr.strip()}", hint=_INSTALL)
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    if version.split(".")[:2] != ours.split("."):
        raise ConfigError(
            f"the Python plugin of {program} has Python {version}; nbdmirror runs with {ours}",
            hint='install nbdmirror for that Python, or set nbd.frontend = "native"',
        )
    return program


class Supervisor:
    """Keeps one nbdkit running, from the first READY to the clean stop."""

    def __init__(self, config: Config, program: str, passed: Sockets) -> None:
        self._config = config
        self._passed = passed
        self._program = program
        self._sockets: list[socket.socket] = []
        self._pid: int | None = None
        self._ready = False  # the nbdkit that runs now
        self._served = False  # any of them
        self._stopping = self._reload_wanted = False
        self._failure: NbdmirrorError | None = None
        self._restarts: deque[float] = deque()

    async def run(self) -> None:
        """Serves until told to stop; raises what keeps it from serving."""
        with signals.handled(self._stop, self._reload):
            await self._serve()

    async def _serve(self) -> None:
        network = LinuxNetwork(self._passed)
        listeners: list[Listener] = []
        alive = asyncio.ensure_future(keep_alive(wanted=lambda: not self._ready))
        try:
            for address in self._config.nbd.listen:
                sock, listener = await network.listening(address)
                sock.setblocking(True)
                listeners.append(listener)
                self._sockets.append(sock)
            await self._keep_running()
        finally:
            alive.cancel()
            for listener in listeners:
                listener.close()

    async def _keep_running(self) -> None:
        how = ""
        while True:
            status = await self._run_nbdkit(how)
            how = _how(status)
            if self._failure is not None:
                raise self._failure
            if self._stopping:
                if status != 0:
                    raise _ended(status, "while it stopped", "the next start recovers")
                return
            if not self._served:
                raise _ended(status, "before it served", "what it said stands above")
            self._count_restart(how)
            world.say(f"nbdkit {how}; it is started again")

    def _count_restart(self, how: str) -> None:
        now = asyncio.get_running_loop().time()
        self._restarts.append(now)
        while self._restarts[0] < now - RESTARTS_SECONDS:
            self._restarts.popleft()
        if len(self._restarts) > RESTARTS_MAX:
            raise NbdmirrorError(
                f"nbdkit ended {len(self._restarts)} times in {RESTARTS_SECONDS:g} s; at last it "
                f"{how}",
                hint='see the journal; nbd.frontend = "native" does without nbdkit',
            )

    # -- one nbdkit --------------------------------------------------------------------------

    async def _run_nbdkit(self, previous: str) -> int:
        """One nbdkit from its start to its end; its wait status."""
        told, tell = os.pipe()
        said, say = os.pipe()
        try:
            self._pid = self._spawn(tell, say, previous)
        finally:
            os.close(tell)
            os.close(say)
        try:
            async with _reading(told) as messages, _reading(said) as text:
                # To the end of both: nobody else holds the pipes.
                await asyncio.gather(self._follow(messages), _pass_on(text))
            _, status = await asyncio.to_thread(os.waitpid, self._pid, 0)
        finally:
            self._pid, self._ready = None, False
            notify(WATCHDOG)  # the time until the next one serves is ours
        return status

    def _spawn(self, tell: int, say: int, previous: str) -> int:
        """Starts nbdkit with ``say`` as descriptor 2, its stderr, the sockets from 3 on, and behind
        them ``tell`` and what was passed for the node in it."""
        pipe = FIRST_FD + len(self._sockets)
        others, told = self._passed.handed_on(pipe + 1)
        sources = [say, *(sock.fileno() for sock in self._sockets), tell, *others]
        # Out of the way first: a number may be both a source and a target.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH_FD) for fd in sources]
        environment = _environment(self._program) | {
            "LISTEN_FDS": str(len(self._sockets)),
            "PYTHONPATH": os.pathsep.join(_import_path()),
            SUPERVISOR_FD: str(pipe),
            HANDED_ON: told,
            SUPERVISOR_PID: str(os.getpid()),
        }
        if previous:
            environment[RESTARTED] = previous
        # LISTEN_PID is known only to the new process itself.
        argv = ["/bin/sh", "-c", 'LISTEN_PID=$$ exec "$0" "$@"', self._program]
        argv += ["--foreground", "--threads=1", "--log=stderr"]
        if self._config.nbd.psk_file is not None:
            argv += ["--tls=require", f"--tls-psk={check_secret(self._config.nbd.psk_file)}"]
        argv += ["python", str(PLUGIN), f"config={self._config.path}"]
        actions: list[tuple[Any, ...]] = [
            (os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate(high, STDERR)
        ]
        try:
            return os.posix_spawn(argv[0], argv, environment, file_actions=actions, setpgroup=0)
        finally:
            for fd in high:
                os.close(fd)

    async def _follow(self, messages: asyncio.StreamReader) -> None:
        async for line in messages:
            self._told(json.loads(line))

    def _told(self, message: dict[str, Any]) -> None:
        if "failed" in message:
            self._failure = NbdmirrorError(message["failed"], hint=message["hint"])
            self._failure.exit_code = message["exit_code"]
            return
        notify(message["notify"])
        if message["notify"].startswith("READY=1"):
            self._ready = self._served = True
            if self._stopping:
                self._signal(signal.SIGTERM)
            elif self._reload_wanted:
                self._reload()

    # -- signals -----------------------------------------------------------------------------

    def _stop(self) -> None:
        """An nbdkit that does not serve yet is stopped as soon as it does."""
        self._stopping = True
        self._signal(signal.SIGTERM)

    def _reload(self) -> None:
        """An nbdkit that does not serve yet may have read already what is to be read again."""
        self._reload_wanted = not self._ready
        self._signal(signal.SIGHUP)

    def _signal(self, number: signal.Signals) -> None:
        if self._pid is not None and self._ready:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)


@contextlib.asynccontextmanager
async def _reading(pipe: int) -> AsyncIterator[asyncio.StreamReader]:
    """What comes out of the pipe, which is closed at the end."""
    stream = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(pipe, "rb")
    )
    try:
        yield stream
    finally:
        transport.close()


async def _pass_on(text: asyncio.StreamReader) -> None:
    """What nbdkit says, the node in it included, goes to the journal as it is, line by line."""
    rest = b""
    while piece := await text.read(LINE_MAX):
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) >= LINE_MAX:
            lines, rest = [*lines, rest], b""
        for line in lines:
            world.say(line.decode(errors="backslashreplace"))
    if rest:
        world.say(rest.decode(errors="backslashreplace"))


def _environment(program: str) -> dict[str, str]:
    """Ours, but nbdkit's Python has its library elsewhere than this one, which may be another
    build of the same version. It looks beside the first python3 in PATH, and where there is none
    takes the library that it was built for: so PATH has but the directory of nbdkit itself."""
    environment = {k: v for k, v in os.environ.items() if k not in _NOT_PASSED_ON}
    return environment | {"PATH": os.path.dirname(os.path.realpath(program))}


def _import_path() -> list[str]:
    """Where nbdkit's Python, which knows no virtual environment, finds what this one uses."""
    packages = [path for path in sys.path if path.endswith("-packages")]
    return [str(Path(nbdmirror.__file__).parents[1]), *packages]


def _ended(status: int, when: str, hint: str) -> NbdmirrorError:
    """What the daemon ends with over its nbdkit; as the node in it did, over a mistake."""
    error = NbdmirrorError(f"nbdkit {_how(status)} {when}", hint=hint)
    if os.waitstatus_to_exitcode(status) == world.EXIT_MISTAKE:
        error.exit_code = world.EXIT_MISTAKE
    return error


def _how(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
