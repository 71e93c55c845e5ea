"""The commands on local disks: those on facets, and ``log replace``. Called by ``main``."""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

from nbdmirror.cli.client import AdminClient, find_socket
from nbdmirror.cli.output import Progress, print_json
from nbdmirror.cli.render import Json, facet_text
from nbdmirror.cli.waiting import Waiting
from nbdmirror.errors import NbdmirrorError, TimedOut

POLL_SECONDS = 0.2


def listing(args: argparse.Namespace) -> int:
    """``facet list``: one line a facet."""
    with _client(args) as client:
        facets = client.call("facet.list")
    if args.json:
        print_json(facets)
    else:
        print("\n".join(f"{facet['volume']}: {facet_text(facet)}" for facet in facets))
    return 0


def offline(args: argparse.Namespace) -> int:
    """``facet offline``: takes a facet out of service; what it misses is kept for its return."""
    return _change(args, "offline", {}, "offline")


def remove(args: argparse.Namespace) -> int:
    """``facet remove``: forgets a facet; its file stays."""
    return _change(args, "remove", {}, "removed")


def online(args: argparse.Namespace) -> int:
    """``facet online``: brings a facet back; only what it lacks is copied."""
    return _change(args, "online", {}, "returns", args.path)


def add(args: argparse.Namespace) -> int:
    """``facet add``: a further facet for a volume, while it is in use."""
    return _change(args, "add", {"volume": args.volume}, "added", args.path)


def replace(args: argparse.Namespace) -> int:
    """``facet replace``: a new disk in the place of a facet that is out of service."""
    new = None if args.new is None else os.path.abspath(args.new)
    params = {} if new is None else {"new": new}
    return _change(args, "replace", params, "replaced", new or args.path)


def log_replace(args: argparse.Namespace) -> int:
    """``log replace``: goes on with the log in a new file, also where its disk was lost."""
    path = os.path.abspath(args.path)
    with _client(args) as client:
        # The new log is written in full first.
        result = client.call("log.replace", {"path": path}, answer_seconds=None)
    if args.json:
        print_json(result)
    else:
        print(f"the log is in {path}")
    return 0


def _client(args: argparse.Namespace) -> AdminClient:
    return AdminClient(find_socket(args.daemon_config, args.socket))


def _change(
    args: argparse.Namespace, action: str, params: Json, done: str, awaited: str | None = None
) -> int:
    """``awaited``: with --wait, the facet that must become synchronised."""
    path = os.path.abspath(args.path)
    with _client(args) as client:
        params = {"path": path, **params}
        result: Any
        if awaited is None or not args.wait:
            result = client.call(f"facet.{action}", params)
        else:
            path, done = os.path.abspath(awaited), "synchronised"
            waiting = Waiting(client, args.timeout, Progress(not args.json))
            waiting.ask(done, f"facet.{action}", params)
            result = _await(waiting, path)
    if args.json:
        print_json(result)
    else:
        print(f"{path}: {done}")
    return 0


def _await(waiting: Waiting, path: str) -> list[Json]:
    while True:
        facets: list[Json] = waiting.ask("synchronised", "facet.list")
        facet = next((one for one in facets if one["path"] == path), None)
        if facet is None:
            raise NbdmirrorError(f"the facet {path} was removed meanwhile")
        if facet["state"] == "synchronised":
            return facets
        if facet["state"] == "not-synchronised" and facet["why"]:
            raise NbdmirrorError(facet_text(facet), hint=facet["next_action"])
        if waiting.ended():
            raise TimedOut(f"{waiting.late('synchronised')}: {facet_text(facet)}")
        time.sleep(POLL_SECONDS)
