"""The commands that talk to a running daemon: status, wait, resync, pause, resume, remote, events.

Owns no state of replication: everything shown is the daemon's answer. Called by ``main``.
"""

from __future__ import annotations

import argparse
import time

from nbdmirror.cli.client import AdminClient, find_socket
from nbdmirror.cli.output import Progress, is_terminal, print_json, print_json_line, print_screen
from nbdmirror.cli.render import (
    Json,
    count_text,
    remote_text,
    status_line,
    status_text,
    verify_text,
)
from nbdmirror.cli.waiting import Waiting, remotes_of
from nbdmirror.errors import NbdmirrorError, NoDaemon

WATCH_SECONDS = 1.0

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
        result = _waiting(client, args).reached(args.until, args.remote)
    if args.json:
        print_json(result)
    else:
        whole = "all remotes" if result.get("role") == "primary" else result.get("node")
        print(f"{args.remote or whole}: {args.until}")
    return 0


def resync(args: argparse.Namespace) -> int:
    """``resync``: starts it; with --wait, returns when the remote is in sync."""
    with _client(args) as client:
        params = {"remote": args.remote, "full": args.full}
        if not args.wait:
            result = client.call("resync", params)
        else:
            waiting = _waiting(client, args)
            waiting.ask("in-sync", "resync", params)
            result = waiting.reached("in-sync", args.remote, STUCK_STATES)
    if args.json:
        print_json(result)
    else:
        print(f"{args.remote}: {'in-sync' if args.wait else 'resync started'}")
    return 0


def verify(args: argparse.Namespace) -> int:
    """``verify``: starts it; with --wait, fails if something differs and was not repaired."""
    with _client(args) as client:
        params = {"remote": args.remote, "repair": args.repair}
        if not args.wait:
            result = client.call("verify", params)
        else:
            waiting = _waiting(client, args)
            waiting.ask("verified", "verify", params)
            for condition in ("verified", "in-sync") if args.repair else ("verified",):
                waiting.reached(condition, args.remote, STUCK_STATES)
            (result,) = remotes_of(waiting.ask("verified", "status"), args.remote)
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


def _waiting(client: AdminClient, args: argparse.Namespace) -> Waiting:
    return Waiting(client, args.timeout, Progress(not args.json))


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
