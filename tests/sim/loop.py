"""A deterministic event loop: integer nanoseconds of virtual time, and a node for every callback.

Runs asyncio's own tasks, task groups, timeouts, locks and queues unchanged. Never touches real
time, sockets or threads: what is not implemented here raises NotImplementedError, which keeps
unsimulated I/O out. When nothing is ready the clock jumps to the next timer; when there is no timer
either, the run is a ``Deadlock``.

A node that loses power is not cancelled: ``Incarnation.kill`` makes the loop drop every callback
whose context belongs to it, so that no ``finally`` runs. Its tasks stay referenced until ``close``,
or the garbage collector would run their clean-up in the middle of the run.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from contextvars import Context, ContextVar, copy_context
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

SECOND_NS = 1_000_000_000
STEPS_PER_INSTANT_MAX = 1_000_000
CLEANUP_AWAITS_MAX = 16


class NodeDead(BaseException):
    """Code of a dead node reached for the world; nothing in the product catches it."""


class Deadlock(Exception):
    """Somebody waits and nothing can ever run again: a lost wake-up."""


class Livelock(Exception):
    """Callbacks run without end and time does not move."""


class Incarnation:
    """One life of a node: from a boot or start until it is killed."""

    __slots__ = ("alive", "held", "node", "number", "running")

    def __init__(self, node: str, number: int = 0) -> None:
        self.node = node
        self.number = number
        self.alive = self.running = True
        self.held: list[SimHandle] = []
        """What would have run while it was stopped, in order."""

    def kill(self) -> None:
        """From now on nothing of this life runs, and what is unwinding reaches nothing."""
        assert self is not WORLD, "the world outlives every node"
        self.alive = self.running = False
        self.held.clear()

    def check(self) -> None:
        """Raises NodeDead in a life that is over: the fence of every simulated port."""
        if not self.alive:
            raise NodeDead(self.node)


WORLD = Incarnation("world")
INCARNATION: ContextVar[Incarnation] = ContextVar("incarnation", default=WORLD)


class SimHandle(asyncio.TimerHandle):
    """A callback that waits for its turn or its time."""

    __slots__ = ("args", "callback", "context", "loop", "off", "timer", "when_ns")

    def __init__(
        self, loop: SimLoop, when_ns: int, callback: Callable[..., Any], args: Any, context: Context
    ) -> None:
        # The base class is not initialised: it is here for isinstance and type checks only.
        self.loop = loop
        self.when_ns = when_ns
        self.callback = callback
        self.args = args
        self.context = context
        self.off = False
        self.timer = False

    def cancel(self) -> None:
        if not self.off:
            self.off = True
            if self.timer:
                self.loop.timer_cancelled()

    def cancelled(self) -> bool:
        return self.off

    def when(self) -> float:
        return self.when_ns / SECOND_NS

    def __repr__(self) -> str:
        name = getattr(self.callback, "__qualname__", type(self.callback).__name__)
        return f"<SimHandle {name} at {self.when_ns} ns>"


if TYPE_CHECKING:  # which declares no abstract method; at run time nothing of it is wanted
    LoopBase = asyncio.BaseEventLoop
else:
    LoopBase = asyncio.AbstractEventLoop


class SimLoop(LoopBase):
    """See the module. ``errors`` holds what would only have been logged: it must stay empty.

    ``shuffle`` draws another order for callbacks that are ready at the same time. asyncio promises
    first in, first out; the option is there to find code that depends on it by accident.
    """

    def __init__(self, *, shuffle: random.Random | None = None) -> None:
        self.now_ns = 0
        self.steps = 0
        self.errors: list[dict[str, Any]] = []
        self._shuffle = shuffle
        self._ready: deque[SimHandle] = deque()
        self._timers: list[tuple[int, int, SimHandle]] = []
        self._timers_off = 0
        self._sequence = 0
        self._task_number = 0
        self._tasks: list[tuple[asyncio.Task[Any], Incarnation]] = []
        self._tasks_max = 1024
        self._running = False
        self._stopping = False
        self._closed = False

    # Running.

    def run_until_complete(self, future: Any) -> Any:
        main = asyncio.ensure_future(future, loop=self)
        main.add_done_callback(self._stop_after)
        try:
            self.run_forever()
        except Exception as error:
            error.add_note(f"at {self.now_ns} ns; pending: {', '.join(self.pending_names())}")
            raise
        finally:
            main.remove_done_callback(self._stop_after)
        assert main.done(), "the loop was stopped before its main future was done"
        return main.result()

    def run_forever(self) -> None:
        assert not self._running and not self._closed
        asyncio._set_running_loop(self)
        self._running = True
        try:
            self._run()
        finally:
            self._stopping = False
            self._running = False
            asyncio._set_running_loop(None)

    def _run(self) -> None:
        ready = self._ready
        limit = self.steps + STEPS_PER_INSTANT_MAX
        while not self._stopping:
            if not ready:
                self._advance()
                limit = self.steps + STEPS_PER_INSTANT_MAX
            elif self.steps > limit:
                raise Livelock(f"{STEPS_PER_INSTANT_MAX} callbacks and no time went by")
            if self._shuffle is not None and len(ready) > 1:
                batch = list(ready)
                self._shuffle.shuffle(batch)
                ready.clear()
                ready.extend(batch)
            for _ in range(len(ready)):
                handle = ready.popleft()
                context = handle.context
                if handle.off or not context.get(INCARNATION, WORLD).running:
                    self._hold(handle)
                    continue
                self.steps += 1
                try:
                    context.run(handle.callback, *handle.args)
                except NodeDead:
                    pass
                except (KeyboardInterrupt, SystemExit):
                    raise
                except BaseException as error:
                    self.call_exception_handler(
                        {"message": f"exception in {handle!r}", "exception": error}
                    )

    @staticmethod
    def _hold(handle: SimHandle) -> None:
        life = handle.context.get(INCARNATION, WORLD)
        if life.alive and not handle.off:
            life.held.append(handle)

    def _advance(self) -> None:
        """Moves time to the next timer that anybody alive waits for."""
        timers, pop, ready = self._timers, heapq.heappop, self._ready
        while timers and not self._wanted(timers[0][2]):
            pop(timers)
        if not timers:
            raise Deadlock("nothing is ready and no timer is set")
        now_ns = self.now_ns = max(self.now_ns, timers[0][0])
        while timers and timers[0][0] <= now_ns:
            handle = pop(timers)[2]
            handle.timer = False
            ready.append(handle)

    def _wanted(self, handle: SimHandle) -> bool:
        return not handle.off and handle.context.get(INCARNATION, WORLD).alive

    def _stop_after(self, _future: asyncio.Future[Any]) -> None:
        self.stop()

    def stop(self) -> None:
        self._stopping = True

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Ends the run: errors nobody saw are recorded, coroutines that never ended are closed."""
        if self._closed:
            return
        assert not self._running
        self._closed = True
        self._ready.clear()
        self._timers.clear()
        self._tell_of_unseen()
        self._keep_unfinished_tasks()
        token = INCARNATION.set(_over())  # what the coroutines' finally clauses do reaches nothing
        try:
            for task, _ in self._tasks:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                _close_coroutine(task)
        finally:
            INCARNATION.reset(token)
        self._ready.clear()
        self._tasks.clear()

    # Scheduling.

    def time(self) -> float:
        return self.now_ns / SECOND_NS

    def call_soon(
        self,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> SimHandle:
        if context is None:
            context = copy_context()
        handle = SimHandle(self, self.now_ns, callback, args, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> SimHandle:
        # Whoever waits for what rounding has left of a second would wait for ever in one instant.
        when_ns = self.now_ns + max(round(delay * SECOND_NS), delay > 0)
        return self.call_at_ns(when_ns, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> SimHandle:
        return self.call_at_ns(round(when * SECOND_NS), callback, *args, context=context)

    def call_at_ns(
        self,
        when_ns: int,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> SimHandle:
        """As ``call_at``, in integer nanoseconds of virtual time."""
        if context is None:
            context = copy_context()
        handle = SimHandle(self, when_ns, callback, args, context)
        handle.timer = True
        self._sequence += 1
        heapq.heappush(self._timers, (when_ns, self._sequence, handle))
        return handle

    def timer_cancelled(self) -> None:
        """Rebuilds the heap once most of it is cancelled timeouts (called by SimHandle)."""
        self._timers_off += 1
        if self._timers_off > 256 and self._timers_off * 2 > len(self._timers):
            self._timers = [entry for entry in self._timers if self._wanted(entry[2])]
            heapq.heapify(self._timers)
            self._timers_off = 0

    # Futures and tasks.

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Any, *, name: object = None, context: Context | None = None
    ) -> asyncio.Task[Any]:
        self._task_number += 1
        life = INCARNATION.get() if context is None else context.get(INCARNATION, WORLD)
        if name is None:  # asyncio's own default counts in the whole process
            name = f"{life.node}-{self._task_number}"
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=str(name), context=context)
        self._tasks.append((task, life))
        if len(self._tasks) > self._tasks_max:
            self._keep_unfinished_tasks()
            self._tasks_max = max(1024, 2 * len(self._tasks))
        return task

    def spawn(
        self, life: Incarnation, coro: Coroutine[Any, Any, T], *, name: str | None = None
    ) -> asyncio.Task[T]:
        """Starts a task that belongs to a node's life, with all that it will start."""
        context = copy_context()
        context.run(INCARNATION.set, life)
        return self.create_task(coro, name=name, context=context)

    def suspend(self, life: Incarnation) -> None:
        """Nothing of a life runs until it is woken, and nothing is lost: a process that is
        stopped, swapped out, or on a machine that is."""
        life.running = False

    def wake(self, life: Incarnation) -> None:
        """It goes on with all that has become due meanwhile."""
        life.running = life.alive
        self._ready.extend(life.held)
        life.held.clear()

    def cut(self, life: Incarnation) -> None:
        """Kills a life in the middle of it, and with it whoever would have come to look at its
        failed tasks: a gather does so when the last of its tasks has ended."""
        life.kill()
        for task, whose in self._tasks:
            if whose is life and task.done() and not task.cancelled():
                task.exception()

    def pending_names(self) -> list[str]:
        """The tasks of live nodes that have not ended, oldest first."""
        return [task.get_name() for task, _ in self._tasks if not task.done()]

    def _keep_unfinished_tasks(self) -> None:
        """Those that failed are kept too: somebody may be about to look."""
        self._tasks = [one for one in self._tasks if not one[0].done() or _unseen(one[0])]

    def _tell_of_unseen(self) -> None:
        for task, _ in self._tasks:
            if task.done() and _unseen(task):
                message = f"task {task.get_name()} failed and nobody looked"
                self.call_exception_handler({"message": message, "exception": task.exception()})

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not isinstance(context.get("exception"), NodeDead):
            self.errors.append(context)

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)

    def get_exception_handler(self) -> None:
        return None

    def set_exception_handler(self, handler: Any) -> NoReturn:
        raise RuntimeError("the simulated loop records every error; handlers would hide them")

    def get_debug(self) -> bool:
        return False

    def set_debug(self, enabled: bool) -> None:
        assert not enabled, "asyncio's debug mode measures real time"

    def get_task_factory(self) -> None:
        return None

    async def shutdown_asyncgens(self) -> None:
        pass

    async def shutdown_default_executor(self) -> None:
        pass

    def call_soon_threadsafe(
        self,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> NoReturn:
        raise RuntimeError("there are no threads in the simulated world")

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], object], *args: *Ts
    ) -> NoReturn:
        raise RuntimeError("there are no threads in the simulated world")


def _over() -> Incarnation:
    life = Incarnation("over")
    life.kill()
    return life


def _close_coroutine(task: asyncio.Task[Any]) -> None:
    """Unwinds a coroutine; whatever its clean-up raises is of no interest any more."""
    coro = task.get_coro()
    assert isinstance(coro, Coroutine)
    for _ in range(CLEANUP_AWAITS_MAX):
        try:
            coro.close()
        except (KeyboardInterrupt, SystemExit):
            raise
        except RuntimeError:
            continue  # it awaits something in its clean-up: on with the rest of it
        except BaseException:
            return
        return


def _unseen(task: asyncio.Task[Any]) -> bool:
    """An exception has been stored, and nobody has asked for it."""
    return bool(getattr(task, "_log_traceback", False))
