"""The methods of the control socket: names, parameters, and the calls on the node behind them.

Owns the table ``METHODS`` and ``NodeApi``, the port to the node. Decides nothing about
replication and knows no socket. Called by ``engine.control``.
"""

from __future__ import annotations

import builtins
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from nbdmirror.codec.admin import INVALID_PARAMS, Json, RpcError
from nbdmirror.config import check_name, parse_address
from nbdmirror.engine.events import EventLog, Page
from nbdmirror.engine.gate import POLICIES
from nbdmirror.errors import ConfigError

TIMEOUT_SECONDS_MAX = 1e9
CURSOR_MAX = 1 << 62
RANGES_MAX = 1000

CONDITIONS = ("in-sync", "connected", "consistent", "verified")


class SnapshotApi(Protocol):
    """What people do with snapshots; ``spec`` is a number or the first digits of a uuid."""

    async def create(self, volume: str | None, protected: bool) -> Json:
        """Takes one of a volume, or of all at one seq (V9)."""

    def list(self) -> list[Json]:
        """All of them, with what was changed since."""

    def diff(self, spec: str, until: str | None, volume: str | None) -> Json:
        """The ranges that the volume changed from a snapshot to a later one, or to now."""

    async def delete(self, spec: str, everywhere: bool) -> Json:
        """Deletes one here, or on the secondaries too."""

    async def refresh(self, spec: str) -> Json:
        """Makes one anew, from the volume as it is (V10)."""

    async def export(self, spec: str, writable: bool) -> Json:
        """Says how to attach one; ``writable`` is remembered."""

    async def restore(
        self, spec: str, volume: str | None, while_attached: bool, keep: bool, force: bool
    ) -> Json:
        """Restores volumes from one; complete on return, the copy runs behind (V12)."""

    async def changed(
        self,
        volume: str,
        ranges: builtins.list[tuple[int, int]],
        facet: str | None,
        force: bool,
    ) -> Json:
        """Takes in what was written to a facet beside the log (V13)."""


class NodeApi(Protocol):
    """What a node does for the people who steer it. Errors are those of ``errors``."""

    @property
    def events(self) -> EventLog:
        """The node's events."""

    def status(self) -> Json:
        """The state of everything, schema 1 of the interface (X4); never waits (I7)."""

    async def wait(
        self, until: str, remote: str | None, timeout: float | None, seq: int | None = None
    ) -> Json:
        """Returns when a remote (None: every one) is in the condition ``until``, one of
        ``CONDITIONS``; TimedOut after ``timeout`` seconds, at once for 0. In sync is what has
        every change up to ``seq`` (None: up to now)."""

    async def resync(self, remote: str, full: bool) -> Json:
        """Starts a resync, of every region if ``full``; returns when its state is durable."""

    async def verify(self, remote: str, repair: bool) -> Json:
        """Has a remote compared by hash with this node; ``repair``: and what differs sent."""

    async def pause(self, remote: str) -> Json | None:
        """Stops replicating to a remote; its changes are tracked."""

    async def resume(self, remote: str) -> Json | None:
        """Ends a pause."""

    def remote_list(self) -> list[Json]:
        """The remotes, as in ``status``."""

    async def remote_add(
        self, name: str, address: str, mode: str, on_link_loss: str
    ) -> Json | None:
        """Adds a remote while volumes are in use (M17)."""

    async def apply(self, frozen: bool, now: bool = False) -> Json | None:
        """On a secondary: stops, or resumes, carrying its log into its facets (V8); ``now``: what
        a delay holds back too, and without one until a primary connects and asks for it."""

    @property
    def people(self) -> SnapshotApi:
        """What people do with snapshots."""

    async def remote_remove(self, name: str) -> Json | None:
        """Forgets a remote; what was kept for it is freed (M17)."""

    async def log_replace(self, path: str) -> Json:
        """Goes on with the log in a new file at ``path`` (M13)."""

    def facet_list(self) -> list[Json]:
        """The local facets, as in ``status``, each with its volume."""

    async def facet(self, action: str, path: str, other: str | None = None) -> list[Json]:
        """offline, online, add (``other``: the volume), remove, replace (``other``: the new path)
        of a local facet (M8, M17); returns the facets. What is copied then is copied behind."""


@dataclass(frozen=True, slots=True)
class Param:
    """One named parameter: its type, and its default unless it is required."""

    kind: type
    required: bool = False
    default: Any = None
    check: Callable[[Any], str | None] = lambda value: None


@dataclass(frozen=True, slots=True)
class Call:
    """One request at work: checked parameters, and ``notify`` to send events (waits for room)."""

    node: NodeApi
    params: Json
    notify: Callable[[list[Json]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Method:
    """A method. ``stream`` goes on after the reply; ``changing`` ones become events; ``waiting``
    ones are cancelled when the client hangs up."""

    handler: Callable[[Call], Awaitable[Any]]
    params: dict[str, Param]
    changing: bool = False
    waiting: bool = False
    stream: Callable[[Call, Any], Awaitable[None]] | None = None


async def _status(call: Call) -> Json:
    return call.node.status()


async def _wait(call: Call) -> Json:
    params = call.params
    return await call.node.wait(params["until"], params["remote"], params["timeout"], params["seq"])


async def _resync(call: Call) -> Json:
    return await call.node.resync(call.params["remote"], call.params["full"])


async def _verify(call: Call) -> Json:
    return await call.node.verify(call.params["remote"], call.params["repair"])


async def _pause(call: Call) -> Json:
    return await call.node.pause(call.params["remote"]) or {}


async def _resume(call: Call) -> Json:
    return await call.node.resume(call.params["remote"]) or {}


async def _remote_list(call: Call) -> list[Json]:
    return call.node.remote_list()


async def _remote_add(call: Call) -> Json:
    params = call.params
    policy = params["on_link_loss"]
    if policy != "continue" and params["mode"] != "sync":
        raise RpcError(INVALID_PARAMS, "remote.add: on_link_loss is for a remote of mode sync")
    result = await call.node.remote_add(params["name"], params["address"], params["mode"], policy)
    return result or {}


async def _remote_remove(call: Call) -> Json:
    return await call.node.remote_remove(call.params["name"]) or {}


async def _facet_list(call: Call) -> list[Json]:
    return call.node.facet_list()


def _facet(action: str, other: str | None = None) -> Method:
    """A command on a facet; ``other`` names its second parameter."""

    async def handler(call: Call) -> list[Json]:
        value = call.params[other] if other is not None else None
        return await call.node.facet(action, call.params["path"], value)

    params = {"path": Param(str, required=True, check=_absolute)}
    if other == "volume":
        params[other] = Param(str, required=True)
    elif other is not None:
        params[other] = Param(str, check=_absolute)
    return Method(handler, params, changing=True)


def _absolute(path: Any) -> str | None:
    good = path.startswith("/") and "\0" not in path and not path.endswith("/")
    return None if good else f"must be an absolute path of a file or device, not {path!r}"


async def _log_replace(call: Call) -> Json:
    return await call.node.log_replace(call.params["path"])


async def _freeze(call: Call) -> Json:
    return await call.node.apply(True) or {}


async def _thaw(call: Call) -> Json:
    return await call.node.apply(False, call.params["now"]) or {}


async def _snapshot_create(call: Call) -> Json:
    return await call.node.people.create(call.params["volume"], call.params["protected"])


async def _snapshot_list(call: Call) -> list[Json]:
    return call.node.people.list()


async def _snapshot_diff(call: Call) -> Json:
    params = call.params
    return call.node.people.diff(params["snapshot"], params["until"], params["volume"])


async def _snapshot_delete(call: Call) -> Json:
    return await call.node.people.delete(call.params["snapshot"], call.params["everywhere"])


async def _snapshot_refresh(call: Call) -> Json:
    return await call.node.people.refresh(call.params["snapshot"])


async def _snapshot_export(call: Call) -> Json:
    return await call.node.people.export(call.params["snapshot"], call.params["writable"])


async def _restore(call: Call) -> Json:
    params = call.params
    return await call.node.people.restore(
        params["snapshot"],
        params["volume"],
        params["while_attached"],
        params["keep"],
        params["force"],
    )


async def _changed(call: Call) -> Json:
    params = call.params
    ranges = [(pair[0], pair[1]) for pair in params["ranges"]]
    return await call.node.people.changed(
        params["volume"], ranges, params["facet"], params["force"]
    )


def _pairs(value: Any) -> str | None:
    if not 0 < len(value) <= RANGES_MAX:
        return f"must be 1 to {RANGES_MAX} pairs"
    for pair in value:
        if not isinstance(pair, list) or [type(n) for n in pair] != [int, int]:
            return "must be pairs of offset and length, in bytes"
    return None


async def _events(call: Call) -> Json:
    """Replays what is held since the cursor; the result's cursor is where the stream begins."""
    cursor: int = call.params["since"]
    while True:
        page = call.node.events.since(cursor)
        await call.notify(_with_gap(page))
        cursor = page.cursor
        if not page.events:
            return {"cursor": cursor, "following": call.params["follow"]}


async def _follow(call: Call, result: Json) -> None:
    cursor: int = result["cursor"]
    while call.params["follow"]:
        page = await call.node.events.follow(cursor)
        await call.notify(_with_gap(page))
        cursor = page.cursor


def _with_gap(page: Page) -> list[Json]:
    """The events of a page; a gap before them is told as an event that is in no history."""
    gap = [{"kind": "gap", "message": "older events are no longer held"}] if page.gap else []
    return gap + list(page.events)


def _one_of(*choices: str) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        return None if value in choices else f"must be {' or '.join(choices)}, not {value!r}"

    return check


def _within(low: float, high: float) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        return None if low <= value <= high else f"must be {low:g} to {high:g}"

    return check


def _valid(parse: Callable[[str], object]) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        try:
            parse(value)
        except ConfigError as error:
            return error.message
        return None

    return check


_REMOTE = Param(str, required=True)
_SNAPSHOT = Param(str, required=True)
_REMOTE_NAME = Param(str, required=True, check=_valid(check_name))

METHODS: dict[str, Method] = {
    "status": Method(_status, {}),
    "wait": Method(
        _wait,
        {
            "until": Param(str, required=True, check=_one_of(*CONDITIONS)),
            "remote": Param(str),
            "timeout": Param(float, check=_within(0, TIMEOUT_SECONDS_MAX)),
            "seq": Param(int, check=_within(0, CURSOR_MAX)),
        },
        waiting=True,
    ),
    "resync": Method(
        _resync, {"remote": _REMOTE, "full": Param(bool, default=False)}, changing=True
    ),
    "verify": Method(
        _verify, {"remote": _REMOTE, "repair": Param(bool, default=False)}, changing=True
    ),
    "pause": Method(_pause, {"remote": _REMOTE}, changing=True),
    "resume": Method(_resume, {"remote": _REMOTE}, changing=True),
    "remote.list": Method(_remote_list, {}),
    "remote.add": Method(
        _remote_add,
        {
            "name": _REMOTE_NAME,
            "address": Param(str, required=True, check=_valid(parse_address)),
            "mode": Param(str, default="async", check=_one_of("async", "sync")),
            "on_link_loss": Param(str, default="continue", check=_one_of(*POLICIES)),
        },
        changing=True,
    ),
    "remote.remove": Method(_remote_remove, {"name": _REMOTE_NAME}, changing=True),
    "log.replace": Method(
        _log_replace, {"path": Param(str, required=True, check=_absolute)}, changing=True
    ),
    "facet.list": Method(_facet_list, {}),
    "facet.offline": _facet("offline"),
    "facet.online": _facet("online"),
    "facet.add": _facet("add", "volume"),
    "facet.remove": _facet("remove"),
    "facet.replace": _facet("replace", "new"),
    "apply.freeze": Method(_freeze, {}, changing=True),
    "apply.thaw": Method(_thaw, {"now": Param(bool, default=False)}, changing=True),
    "snapshot.create": Method(
        _snapshot_create,
        {"volume": Param(str), "protected": Param(bool, default=False)},
        changing=True,
    ),
    "snapshot.list": Method(_snapshot_list, {}),
    "snapshot.diff": Method(
        _snapshot_diff, {"snapshot": _SNAPSHOT, "until": Param(str), "volume": Param(str)}
    ),
    "snapshot.delete": Method(
        _snapshot_delete,
        {"snapshot": _SNAPSHOT, "everywhere": Param(bool, default=False)},
        changing=True,
    ),
    "snapshot.refresh": Method(_snapshot_refresh, {"snapshot": _SNAPSHOT}, changing=True),
    "snapshot.export": Method(
        _snapshot_export,
        {"snapshot": _SNAPSHOT, "writable": Param(bool, default=False)},
        changing=True,
    ),
    "restore": Method(
        _restore,
        {
            "snapshot": _SNAPSHOT,
            "volume": Param(str),
            "while_attached": Param(bool, default=False),
            "keep": Param(bool, default=True),
            "force": Param(bool, default=False),
        },
        changing=True,
    ),
    "changed": Method(
        _changed,
        {
            "volume": Param(str, required=True),
            "ranges": Param(list, required=True, check=_pairs),
            "facet": Param(str, check=_absolute),
            "force": Param(bool, default=False),
        },
        changing=True,
    ),
    "events": Method(
        _events,
        {
            "since": Param(int, default=0, check=_within(0, CURSOR_MAX)),
            "follow": Param(bool, default=True),
        },
        waiting=True,
        stream=_follow,
    ),
}

_KIND_NAMES: dict[type, str] = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    list: "a list",
}


def check_params(name: str, params: Json) -> Json:
    """The parameters of method ``name``, complete and checked; RpcError says what is wrong."""
    schema = METHODS[name].params
    for key in params:
        if key not in schema:
            known = ", ".join(schema) or "none"
            raise RpcError(INVALID_PARAMS, f"{name}: no parameter {key!r}; known: {known}")
    checked = {}
    for key, param in schema.items():
        value = params.get(key)
        if value is None and param.required:
            raise RpcError(INVALID_PARAMS, f"{name}: parameter {key!r} is missing")
        problem = None if value is None else _check_value(param, value)
        if problem is not None:
            raise RpcError(INVALID_PARAMS, f"{name}: {key} {problem}")
        checked[key] = param.default if value is None else value
    return checked


def _check_value(param: Param, value: Any) -> str | None:
    kinds = (int, float) if param.kind is float else param.kind
    if not isinstance(value, kinds) or isinstance(value, bool) is not (param.kind is bool):
        return f"must be {_KIND_NAMES[param.kind]}"
    return param.check(value)
