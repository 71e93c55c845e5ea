"""The node inside an nbdkit process: its loop in a thread, and the way there from nbdkit's threads.

Owns the loop's thread, the hand-over of requests, the clean end, and what the supervisor is told.
Never calls nbdkit itself (``nbdkit_plugin`` does) and never touches the node outside its loop.

Every callback of nbdkit runs in a thread of nbdkit's, one per connection. It posts its work to the
loop and sleeps until the result is there, so the engine sees one thread, as in the native daemon.

nbdkit ends when its connections have ended, and one whose client is silent never does by itself:
so on SIGTERM the bridge shuts the receiving side of all client sockets. Requests in flight finish
and are answered, the threads see the end of input, nbdkit calls ``cleanup``, and the node stops
with nobody left to ask it for anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import json
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Coroutine, Iterator
from types import CoroutineType
from typing import Any

from nbdmirror.codec.nbd import ExportInfo, wire_errno
from nbdmirror.codec.nbdhandshake import Forbidden
from nbdmirror.config import Config
from nbdmirror.configfile import load
from nbdmirror.edge import env as world
from nbdmirror.edge import signals
from nbdmirror.edge.daemon import Daemon
from nbdmirror.edge.journal import JOURNAL
from nbdmirror.edge.lock import exclusive
from nbdmirror.edge.nbdkit_strangers import Peer, Strangers
from nbdmirror.edge.notify import notify
from nbdmirror.edge.sockets import Sockets
from nbdmirror.engine.access import Client as Identity
from nbdmirror.engine.node import STOP_SECONDS
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import NbdmirrorError, StateError, VolumeFailed

SUPERVISOR_FD = "NBDMIRROR_SUPERVISOR_FD"
"""Environment: the pipe to the supervisor, one JSON object a line."""
SUPERVISOR_PID = "NBDMIRROR_SUPERVISOR_PID"
RESTARTED = "NBDMIRROR_RESTARTED"
"""Environment: how the nbdkit before this one ended."""

UNSEEN = Identity()
"""nbdkit does not tell its plugins who connects; the configuration asks for no more then."""

REPLY_SECONDS = 2.0
"""At the end, a client gets so long to read the last reply."""
_TICK_SECONDS = 0.25
_SWEEP_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1

Result = Any
Work = Callable[..., Result | Coroutine[Any, Any, Result]]


class Client:
    """One connection: its volume, and its place to wait. nbdkit runs one request of it at a time
    (the thread model says so), so one lock is enough."""

    __slots__ = ("_bridge", "_done", "_error", "_result", "info", "peer", "volume")

    def __init__(self, bridge: Bridge, peer: Peer | None = None) -> None:
        self._bridge = bridge
        self.peer = peer
        self._done = threading.Lock()
        self._done.acquire()
        self._result: Result = None
        self._error: BaseException | None = None
        self.volume: Volume
        self.info: ExportInfo

    def call(self, work: Work, *args: Any) -> Result:
        """Runs ``work(*args)`` on the loop, awaits it if it gives a coroutine, returns what it
        gives. VolumeFailed carries the errno for the wire, whatever went wrong (I8)."""
        bridge = self._bridge
        bridge.waiting[self] = None
        if bridge.closed:
            self._gone()
        else:
            try:
                bridge.loop.call_soon_threadsafe(self._begin, work, args)
            except RuntimeError:  # the loop was closed since
                self._gone()
            else:
                self._done.acquire()
        bridge.waiting.pop(self, None)
        error = self._error
        if error is None:
            return self._result
        self._error = None
        raise error

    def _gone(self) -> None:
        self._error = VolumeFailed("the node has stopped", number=errno.ESHUTDOWN)

    def abandon(self) -> None:
        """The loop is gone: whoever waits here gets ESHUTDOWN."""
        self._gone()
        with contextlib.suppress(RuntimeError):  # it was answered at this very moment
            self._done.release()

    # -- on the loop -------------------------------------------------------------------------

    def _begin(self, work: Work, args: tuple[Any, ...]) -> None:
        try:
            result = work(*args)
        except Exception as error:
            self._fail(error)
        else:
            if type(result) is CoroutineType:
                self._bridge.follow(result, self._settled)
                return
            self._result = result
        self._done.release()

    def _settled(self, task: asyncio.Task[Result]) -> None:
        """Also of one that was cancelled before it began."""
        if task.cancelled():
            self._gone()
        elif (error := task.exception()) is None:
            self._result = task.result()
        else:
            self._fail(error)
        self._done.release()

    def _fail(self, error: BaseException) -> None:
        number = getattr(error, "errno", None) or errno.EIO
        self._error = VolumeFailed(str(error), number=wire_errno(number))


class Bridge:
    """The node's side of one nbdkit process. ``check`` in get_ready, ``start`` in after_fork,
    ``close`` in cleanup; ``shut_down`` is nbdkit's own request to end."""

    def __init__(self, config_path: str, shut_down: Callable[[], None]) -> None:
        self._sockets = Sockets.of(os.environ)
        self.config: Config = self._sockets.extended(load(config_path))
        self.loop: asyncio.AbstractEventLoop
        self.daemon: Daemon
        self.closed = False
        self.waiting: dict[Client, None] = {}
        self._shut_down = shut_down
        self._tasks: dict[asyncio.Task[Result], None] = {}
        self._counting = threading.Lock()
        self._strangers = Strangers(self.config.limits, self._counted, self._refused)
        self._listening: list[Any] = []
        self._started = threading.Event()
        self._quiet: asyncio.Event
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="node", daemon=True)
        self._signals, self._wakeup = socket.socketpair()

    # -- called by nbdkit's main thread ------------------------------------------------------

    def check(self) -> None:
        """What can be found wrong without changing anything, while every mode of nbdkit still
        shows it: the state is there, readable, and of this node."""
        store = Store.open(world.real_env().disk, self.config.state_dir, read_only=True)
        store.close()
        if store.state["node"] != self.config.node:
            raise StateError(
                f"{self.config.state_dir} belongs to node {store.state['node']!r}, not "
                f"{self.config.node!r}",
                hint="point state_dir to the right directory",
            )

    def start(self) -> None:
        """Recovers and starts the node; returns when it serves, raises what keeps it from that.

        Threads do not survive a fork, so it is here that the loop's thread starts."""
        ours = [one.socket.getsockname() for one in self._sockets.passed if one.socket]
        names = [sock.getsockname() for sock in _sockets() if _accepts(sock)]
        self._listening = [name for name in names if name not in ours]
        self._take_signals()
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure
        with contextlib.suppress(RuntimeError):  # it has ended already: ``close`` tells
            self.loop.call_soon_threadsafe(self.daemon.ready)

    def close(self) -> None:
        """No connection is left: stops the node cleanly; raises what it failed with."""
        with contextlib.suppress(RuntimeError):  # it ended by itself
            self.loop.call_soon_threadsafe(self._end)
        self._thread.join()
        signals.ignore()
        if self._failure is not None:
            raise self._failure

    def _take_signals(self) -> None:
        """nbdkit handles signals by quitting in its own way. Python's handler takes its place, and
        passes the number to the loop through a socket: no Python code runs in the main thread."""
        self._signals.setblocking(False)
        self._wakeup.setblocking(False)
        for number in signals.HANDLED:
            signal.signal(number, lambda *_: None)
            signal.siginterrupt(number, False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)

    # -- the loop's thread -------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with exclusive(self.config.state_dir):
                world.run(self._live())
        except BaseException as error:
            self._failure = error
        self.closed = True
        for client in list(self.waiting):
            client.abandon()
        if self._started.is_set():
            self._shut_down()
            self._shut_clients(socket.SHUT_RDWR)
        self._started.set()

    async def _live(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._quiet = asyncio.Event()
        self.daemon = daemon = Daemon(self.config, self._sockets, tell=tell)
        self.loop.add_reader(self._signals, self._signalled)
        daemon.node.doors.room.elsewhere = self._connections
        await daemon.start(nbd=False)
        self._end_strangers()
        if why := os.environ.get(RESTARTED):
            daemon.node.events.emit("nbdkit-restarted", why=why)
        self._started.set()
        await daemon.ending()
        self._shut_down()
        await self._hang_up()
        await daemon.finish()

    def _signalled(self) -> None:
        for number in self._signals.recv(64):
            if number == signal.SIGHUP:
                self.daemon.reload()
            else:
                self.daemon.stop.set()

    def _end(self) -> None:
        self.daemon.stop.set()
        self._quiet.set()

    async def _hang_up(self) -> None:
        """Takes no more from clients, until ``close`` says that the last of them is gone. One
        that does not read its reply is not waited for."""
        began = self.loop.time()
        while not self._quiet.is_set():
            late = self.loop.time() - began
            busy = bool(self._tasks) and late < STOP_SECONDS
            how = socket.SHUT_RDWR if late > REPLY_SECONDS and not busy else socket.SHUT_RD
            self._shut_clients(how)
            if late >= STOP_SECONDS:  # what waits for a remote, as in ``ExportServer.stop``
                exports = self.daemon.node.exports
                if exports is not None and exports.group is not None:
                    exports.group.end()
                for task in list(self._tasks):
                    task.cancel()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._quiet.wait(), _TICK_SECONDS)

    def _shut_clients(self, how: int) -> None:
        for sock in self._clients():
            with contextlib.suppress(OSError):
                sock.shutdown(how)

    # -- for the plugin ----------------------------------------------------------------------

    def follow(
        self, work: Coroutine[Any, Any, Result], settled: Callable[[asyncio.Task[Result]], None]
    ) -> None:
        """Keeps a request that has to wait (on the loop)."""
        task = self.loop.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._tasks.__delitem__)
        task.add_done_callback(settled)

    def _clients(self) -> Iterator[socket.socket]:
        """The sockets of nbdkit's connections: accepted from what it listens on."""
        for sock in _sockets():
            name = sock.getsockname()
            ours = name in self._listening or _anywhere(name) in self._listening
            if ours and not _accepts(sock):
                yield sock

    def admit(self, peer: Peer | None) -> bool:
        """Whether a connection that has just come may stay. If there are more than the limit
        allows, or than there are descriptors for, the oldest stranger goes for it."""
        if peer is not None:
            self._strangers.came(peer)
        left = self.daemon.node.doors.room.left
        too_many = self._connections() > self.config.limits.connections_max
        full = too_many or (left is not None and left < 0)
        return not full or self._strangers.make_room(peer)

    def _end_strangers(self) -> None:
        self._strangers.end_late()
        self.loop.call_later(_SWEEP_SECONDS, self._end_strangers)

    def _refused(self, address: str, why: str) -> None:
        tell = self.daemon.node.doors.refusals.tell
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(tell, "nbd", address, why)

    def _counted(self) -> Iterator[socket.socket]:
        """The same by one thread at a time: a look by another would find duplicates too."""
        with self._counting:
            yield from self._clients()

    def _connections(self) -> int:
        return sum(1 for _ in self._counted())

    def attach(self, name: str, peer: Peer | None) -> Client:
        """A connection to an export; VolumeFailed if there is none of that name."""
        client = Client(self, peer)
        client.call(self._attach, client, name)
        if peer is not None:
            self._strangers.known(peer)
        return client

    def _attach(self, client: Client, name: str) -> None:
        exports = self.daemon.node.exports
        assert exports is not None
        volume, info = exports.volume(name), exports.find_for(UNSEEN, name)
        if volume is None or not isinstance(info, ExportInfo):
            why = info.why if isinstance(info, Forbidden) else f"no export {name!r} here"
            exports.refused("nbd", "a client of nbdkit", why)
            raise VolumeFailed(why)
        client.volume, client.info = volume, info
        volume.clients += 1

    def detach(self, client: Client) -> None:
        """The connection has ended, or only asked what there is."""
        client.call(self._detach, client)
        if client.peer is not None:
            self._strangers.came(client.peer)

    def _detach(self, client: Client) -> None:
        client.volume.clients -= 1

    def exports(self) -> list[ExportInfo]:
        """What can be attached now."""
        result: list[ExportInfo] = Client(self).call(self._exports)
        return result

    def _exports(self) -> list[ExportInfo]:
        exports = self.daemon.node.exports
        return exports.exports() if exports is not None else []


def _sockets() -> Iterator[socket.socket]:
    """Every stream socket of this process, as a duplicate that is closed behind the loop body."""
    for entry in os.listdir("/proc/self/fd"):
        try:
            # Duplicated first: whatever the number stands for by then, it stays that.
            fd = os.dup(int(entry))
        except OSError:
            continue  # closed since
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            os.close(fd)
            continue
        with socket.socket(fileno=fd) as sock:
            if sock.type == socket.SOCK_STREAM:
                yield sock


def _anywhere(name: Any) -> Any:
    """The name of what listens at the port on every address of the host."""
    if not isinstance(name, tuple):
        return name
    return ("0.0.0.0", name[1]) if len(name) == 2 else ("::", name[1], 0, 0)


def _accepts(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


# -- the supervisor ------------------------------------------------------------------------------


def tell(text: str) -> None:
    """What the service manager should know; through the supervisor, if there is one."""
    if SUPERVISOR_FD in os.environ:
        _send(notify=text)
    else:
        notify(text)


def end(error: Exception) -> None:
    """Ends this process, which cannot serve: the reason goes to the supervisor, or is printed. A
    mistake of the program is printed for both: the next start may do better."""
    message, hint, exit_code = world.reason(error)
    if SUPERVISOR_FD in os.environ and exit_code != world.EXIT_MISTAKE:
        _send(failed=message, hint=hint, exit_code=exit_code)
    else:
        world.say_why(error)
    JOURNAL.flush()
    os._exit(exit_code)


def _send(**fields: str | int | None) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(int(os.environ[SUPERVISOR_FD]), json.dumps(fields).encode() + b"\n")


def die_with_supervisor() -> None:
    """A supervisor that is killed takes this process with it, at once: what comes next must find
    the sockets and the state free. Does nothing without a supervisor."""
    pid = os.environ.get(SUPERVISOR_PID)
    if pid is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != int(pid):
        os._exit(NbdmirrorError.exit_code)
