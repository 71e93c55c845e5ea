"""Waits for what a daemon is to come to, no longer than --timeout says, whatever it does meanwhile.

Owns the deadline of one command: all that it asks counts. Called by ``cli.online`` and
``cli.facets``.
"""

from __future__ import annotations

import time
from typing import Any

from nbdmirror.cli.client import ANSWER_SECONDS, AdminClient
from nbdmirror.cli.output import Progress
from nbdmirror.cli.render import Json, count_text, remote_text, seconds_text, status_line
from nbdmirror.errors import NbdmirrorError, NoDaemon, TimedOut

# How long the daemon holds a ``wait`` before this side looks at the progress.
WAIT_STEP_SECONDS = 1.0
GRACE_SECONDS = 1.0
"""So long after its end a wait hears the daemon out."""


class Waiting:
    """One command that waits; ``timeout`` seconds from now on, ``None``: for ever."""

    def __init__(self, client: AdminClient, timeout: float | None, progress: Progress) -> None:
        self._client = client
        self._timeout = timeout
        self._end = None if timeout is None else time.monotonic() + timeout
        self._progress = progress

    def ask(self, until: str, method: str, params: Json | None = None, step: float = 0.0) -> Any:
        """The daemon's answer, which it holds back for ``step`` seconds at the most. TimedOut if
        it has none by the end; ``until`` is what is waited for then."""
        patience = step + ANSWER_SECONDS
        if self._end is not None:
            patience = min(patience, max(step, self._end - time.monotonic()) + GRACE_SECONDS)
        try:
            return self._client.call(method, params, answer_seconds=patience)
        except NoDaemon as error:
            if not self.ended():
                raise
            raise TimedOut(f"{self.late(until)}: {error.message}", hint=error.hint) from None

    def reached(self, until: str, remote: str | None, stuck_states: tuple[str, ...] = ()) -> Any:
        """The daemon's answer once the condition is true. TimedOut tells state and next action; so
        does NbdmirrorError of a remote that is in one of ``stuck_states``."""
        # What is written while this side looks at the progress does not prolong the wait.
        log = self.ask(until, "status").get("log") or {} if until == "in-sync" else {}
        changes = {"seq": log["next_seq"] - 1} if "next_seq" in log else {}
        try:
            while True:
                step = WAIT_STEP_SECONDS
                if self._end is not None:
                    step = max(0.0, min(step, self._end - time.monotonic()))
                params = {"until": until, "remote": remote, "timeout": step, **changes}
                try:
                    return self.ask(until, "wait", params, step)
                except TimedOut:
                    status = self.ask(until, "status")
                    remotes = remotes_of(status, remote)
                for one in remotes:
                    if one.get("state") in stuck_states:
                        hint = one.get("next_action")
                        raise NbdmirrorError(
                            f"the resync does not go on: {remote_text(one)}", hint=hint
                        )
                if self.ended():
                    raise _timed_out(self.late(until), status, remotes)
                self._progress.show(remotes)
        finally:
            self._progress.end()

    def ended(self) -> bool:
        """Whether the time is over."""
        return self._end is not None and time.monotonic() >= self._end

    def late(self, until: str) -> str:
        """What has not come true by then."""
        return f"not {until} after {seconds_text(self._timeout or 0.0)}"


def remotes_of(status: Json, name: str | None) -> list[Json]:
    """The remotes in a status; only the one of that name."""
    remotes = status.get("remotes", [])
    return [remote for remote in remotes if name in (None, remote.get("name"))]


def _unapplied(remote: Json) -> str:
    """Of a remote that has all, and not in its facets."""
    records = remote.get("durable_seq", 0) - remote.get("applied_seq", 0)
    if remote.get("state") != "synchronised" or records <= 0:
        return ""
    return (
        f", {count_text(records, 'record')} not applied there: slow, or frozen or delayed "
        f"(on {remote.get('name')}: nbdmirror status)"
    )


def _timed_out(late: str, status: Json, remotes: list[Json]) -> TimedOut:
    where = "; ".join(remote_text(one) + _unapplied(one) for one in remotes)
    actions = [remote["next_action"] for remote in remotes if remote.get("next_action")]
    upstream = status.get("upstream")
    if upstream is not None:  # a secondary has conditions of its own
        where = status_line(status)
        actions = [upstream["next_action"]] if upstream.get("next_action") else []
    return TimedOut(late + (f": {where}" if where else ""), hint="; ".join(actions) or None)
