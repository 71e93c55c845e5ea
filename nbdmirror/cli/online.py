"""The commands that talk to a running daemon: status, wait, resync, pause, resume, remote, events.

Owns no state of replication: everything shown is the daemon's answer. Called by ``main``.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from nbdmirror.cli.client import ANSWER_SECONDS, AdminClient, find_socket
from nbdmirror.cli.output import Progress, is_terminal, print_json, print_json_line, print_screen
from nbdmirror.cli.render import (
    Json,
    count_text,
    remote_text,
    seconds_text,
    status_line,
    status_text,
    verify_text,
)
from nbdmirror.errors import NbdmirrorError, NoDaemon, TimedOut

WATCH_SECONDS = 1.0
# How long the daemon holds a ``wait`` before this side looks at the progress.
WAIT_STEP_SECONDS = 1.0
GRACE_SECONDS = 1.0
"""So long after its end a wait hears the daemon out."""

# From these a resync does not go on by itself.
STUCK_STATES = ("paused", "diverged", "refused", "failed")


def status(args: argparse.Namespace) -> int:
    """``status``: one screen, or every second with --watch until interrupted."""
    if args.watch:
        return _watch(args)
    with _client(args) as client:
        data = client.call("status")
    if args.json:
        print_json(data)
    else:
        print(status_text(data))
    return 0


def wait(args: argparse.Namespace) -> int:
    """``wait``: exit 3 if the condition does not come true in time."""
    with _client(args) as client:
        result = _await_condition(
            client, args.until, args.remote, args.timeout, Progress(not args.json)
        )
    if args.json:
        print_json(result)
    else:
        whole = "all remotes" if result.get("role") == "primary" else result.get("node")
        print(f"{args.remote or whole}: {args.until}")
    return 0


def resync(args: argparse.Namespace) -> int:
    """``resync``: starts it; with --wait, returns when the remote is in sync."""
    with _client(args) as client:
        result = client.call("resync", {"remote": args.remote, "full": args.full})
        if args.wait:
            progress = Progress(not args.json)
            result = _await_condition(
                client, "in-sync", args.remote, args.timeout, progress, STUCK_STATES
            )
    if args.json:
        print_json(result)
    else:
        print(f"{args.remote}: {'in-sync' if args.wait else 'resync started'}")
    return 0


def verify(args: argparse.Namespace) -> int:
    """``verify``: starts it; with --wait, fails if something differs and was not repaired."""
    with _client(args) as client:
        result = client.call("verify", {"remote": args.remote, "repair": args.repair})
        if args.wait:
            progress = Progress(not args.json)
            for condition in ("verified", "in-sync") if args.repair else ("verified",):
                _await_condition(
                    client, condition, args.remote, args.timeout, progress, STUCK_STATES
                )
            (result,) = _remotes(client.call("status"), args.remote)
    if args.json:
        print_json(result)
    elif not args.wait:
        print(f"{args.remote}: verify started")
    if not args.wait:
        return 0
    found = result.get("verify") or {}
    if found.get("differing", 0) > found.get("repaired", 0):
        verb = "differs" if found["differing"] == 1 else "differ"
        raise NbdmirrorError(
            f"{args.remote}: {count_text(found['differing'], 'region')} {verb}",
            hint=f"nbdmirror events has them; nbdmirror verify {args.remote} --repair sends them",
        )
    if not args.json:
        print(f"{args.remote}: {verify_text(found)}")
    return 0


def pause(args: argparse.Namespace) -> int:
    """``pause``: stops replication to one remote."""
    return _change(args, "pause", {"remote": args.remote}, f"{args.remote}: paused")


def resume(args: argparse.Namespace) -> int:
    """``resume``: starts replication to one remote again."""
    return _change(args, "resume", {"remote": args.remote}, f"{args.remote}: resumed")


def remote_list(args: argparse.Namespace) -> int:
    """``remote list``: one line a remote."""
    with _client(args) as client:
        remotes = client.call("remote.list")
    if args.json:
        print_json(remotes)
    else:
        print("\n".join(map(remote_text, remotes)) or "no remotes")
    return 0


def remote_add(args: argparse.Namespace) -> int:
    """``remote add``: a new remote starts with a full synchronisation."""
    params = {"name": args.name, "address": args.address, "mode": args.mode}
    if args.on_link_loss is not None:
        params["on_link_loss"] = args.on_link_loss
    return _change(args, "remote.add", params, f"{args.name}: added")


def remote_remove(args: argparse.Namespace) -> int:
    """``remote remove``: forgets a remote."""
    return _change(args, "remote.remove", {"name": args.name}, f"{args.name}: removed")


def freeze(args: argparse.Namespace) -> int:
    """``apply freeze``: a secondary's facets stay at this point; its log goes on receiving."""
    return _change(args, "apply.freeze", {}, "applying is frozen")


def thaw(args: argparse.Namespace) -> int:
    """``apply thaw``: a secondary's facets follow its log again."""
    done = "applying goes on" + (", without a delay" if args.now else "")
    return _change(args, "apply.thaw", {"now": args.now}, done)


def events(args: argparse.Namespace) -> int:
    """``events``: one JSON object a line, until interrupted unless --no-follow."""
    with _client(args) as client:
        try:
            for event in client.events(args.since, args.follow):
                print_json_line(event)
        except KeyboardInterrupt:
            pass
    return 0


def only_uri(args: argparse.Namespace) -> str:
    """The first URI of the daemon's only volume, for ``attach`` without one."""
    with _client(args) as client:
        volumes = client.call("status").get("volumes", [])
    uris = [volume["uris"][0] for volume in volumes if volume.get("uris")]
    if len(uris) != 1:
        hint = f"give its URI: {' or '.join(uris)}" if uris else "give a URI"
        raise NbdmirrorError(f"the daemon serves {count_text(len(uris), 'volume')}", hint=hint)
    return str(uris[0])


def _client(args: argparse.Namespace) -> AdminClient:
    return AdminClient(find_socket(args.daemon_config, args.socket))


def _change(args: argparse.Namespace, method: str, params: Json, done: str) -> int:
    with _client(args) as client:
        result = client.call(method, params)
    if args.json:
        print_json(result)
    else:
        print(done)
    return 0


def _watch(args: argparse.Namespace) -> int:
    """A new connection each time, so that a terminal sees a daemon come back after a restart."""
    interactive = is_terminal() and not args.json
    seen = False
    try:
        while True:
            try:
                with _client(args) as client:
                    _print_watched(client.call("status"), args.json, interactive)
                seen = True
            except NoDaemon as error:
                if not (interactive and seen):
                    raise
                print_screen(error.message)
            time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        return 0


def _print_watched(data: Json, as_json: bool, interactive: bool) -> None:
    if as_json:
        print_json_line(data)
    elif interactive:
        print_screen(status_text(data))
    else:
        print(status_line(data), flush=True)


def _await_condition(
    client: AdminClient,
    until: str,
    remote: str | None,
    timeout: float | None,
    progress: Progress,
    stuck_states: tuple[str, ...] = (),
) -> Any:
    """The daemon's answer once the condition is true. TimedOut tells state and next action."""
    end = None if timeout is None else time.monotonic() + timeout

    def ask(method: str, params: Json | None = None, step: float = 0.0) -> Any:
        patience = step + ANSWER_SECONDS
        if end is not None:
            patience = min(patience, max(step, end - time.monotonic()) + GRACE_SECONDS)
        try:
            return client.call(method, params, answer_seconds=patience)
        except NoDaemon as error:
            if end is None or time.monotonic() < end:
                raise
            late = f"not {until} after {seconds_text(timeout or 0.0)}"
            raise TimedOut(f"{late}: {error.message}", hint=error.hint) from None

    # What is written while this side looks at the progress does not prolong the wait.
    log = ask("status").get("log") or {} if until == "in-sync" else {}
    changes = {"seq": log["next_seq"] - 1} if "next_seq" in log else {}
    try:
        while True:
            step = WAIT_STEP_SECONDS
            if end is not None:
                step = max(0.0, min(step, end - time.monotonic()))
            params = {"until": until, "remote": remote, "timeout": step, **changes}
            try:
                return ask("wait", params, step)
            except TimedOut:
                status = ask("status")
                remotes = _remotes(status, remote)
            for one in remotes:
                if one.get("state") in stuck_states:
                    hint = one.get("next_action")
                    raise NbdmirrorError(
                        f"the resync does not go on: {remote_text(one)}", hint=hint
                    )
            if end is not None and time.monotonic() >= end:
                raise _timed_out(until, timeout or 0.0, status, remotes)
            progress.show(remotes)
    finally:
        progress.end()


def _remotes(status: Json, name: str | None) -> list[Json]:
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


def _timed_out(until: str, timeout: float, status: Json, remotes: list[Json]) -> TimedOut:
    where = "; ".join(remote_text(one) + _unapplied(one) for one in remotes)
    actions = [remote["next_action"] for remote in remotes if remote.get("next_action")]
    upstream = status.get("upstream")
    if upstream is not None:  # a secondary has conditions of its own
        where = status_line(status)
        actions = [upstream["next_action"]] if upstream.get("next_action") else []
    message = f"not {until} after {seconds_text(timeout)}" + (f": {where}" if where else "")
    return TimedOut(message, hint="; ".join(actions) or None)
