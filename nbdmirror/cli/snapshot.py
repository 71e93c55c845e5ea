"""The ``snapshot`` commands. Called by ``main``; everything shown is the daemon's answer."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime

from nbdmirror.cli.client import AdminClient, find_socket
from nbdmirror.cli.output import print_json
from nbdmirror.cli.render import Json, count_text, size_text
from nbdmirror.errors import NbdmirrorError, UsageError

KIND_TEXTS = {
    "resync": "before the resync",
    "restore": "before a restore",
    "delayed": "where a delay was given up",
}


def create(args: argparse.Namespace) -> int:
    """``snapshot create``: of a volume, or of all at one point of the write order."""
    params = {"volume": args.volume, "protected": args.protect}
    return _call(args, "snapshot.create", params, snapshot_text)


def list_all(args: argparse.Namespace) -> int:
    """``snapshot list``: one line a snapshot, oldest first."""
    with _client(args) as client:
        found = client.call("snapshot.list")
    if args.json:
        print_json(found)
    else:
        print("\n".join(map(snapshot_text, found)) or "no snapshots")
    return 0


def diff(args: argparse.Namespace) -> int:
    """``snapshot diff``: the ranges changed from one snapshot to another, or to now."""
    params = {"snapshot": args.snapshot, "until": args.until, "volume": args.volume}
    return _call(args, "snapshot.diff", params, diff_text)


def delete(args: argparse.Namespace) -> int:
    """``snapshot delete``: here, or on the secondaries too."""
    params = {"snapshot": args.snapshot, "everywhere": args.everywhere}
    return _call(args, "snapshot.delete", params, lambda _: f"{args.snapshot}: deleted")


def refresh(args: argparse.Namespace) -> int:
    """``snapshot refresh``: takes it anew, from the volumes as they are now."""
    return _call(args, "snapshot.refresh", {"snapshot": args.snapshot}, snapshot_text)


def export(args: argparse.Namespace) -> int:
    """``snapshot export``: how to attach one, read-only unless made writable."""
    params = {"snapshot": args.snapshot, "writable": args.writable}
    return _call(args, "snapshot.export", params, _uris_text)


def _uris_text(made: Json) -> str:
    if not made["uris"]:  # an empty line would be taken for a URI
        hint = "name one in [nbd] listen, and restart the daemon"
        raise NbdmirrorError("the daemon has no address at which clients attach", hint=hint)
    return "\n".join(made["uris"])


def restore(args: argparse.Namespace) -> int:
    """``restore``: volumes become what a snapshot is; complete at once, copied behind."""
    params = {
        "snapshot": args.snapshot,
        "volume": args.volume,
        "while_attached": args.while_attached,
        "keep": args.keep,
        "force": args.force,
    }
    return _call(args, "restore", params, restore_text)


def changed(args: argparse.Namespace) -> int:
    """``changed``: a facet was written to by something else; the other copies follow."""
    ranges = [_range(text) for text in args.ranges]
    params = {
        "volume": args.volume,
        "ranges": ranges,
        "facet": None if args.facet is None else os.path.abspath(args.facet),
        "force": args.force,
    }
    return _call(args, "changed", params, _changed_text)


def _changed_text(done: Json) -> str:
    return f"{size_text(done['bytes'])} taken in from {done['facet']}"


def _range(text: str) -> list[int]:
    match = re.fullmatch(r"([0-9]{1,20})\+([0-9]{1,20})", text)
    if match is None:
        raise UsageError(f"{text!r} is not a range", hint="OFFSET+LENGTH, in bytes: 65536+4096")
    return [int(number) for number in match.groups()]


def restore_text(done: Json) -> str:
    """What was done, and how to undo it."""
    lines = ["restored"]
    if done.get("total_bytes"):
        lines = [f"restored; {size_text(done['total_bytes'])} are being copied behind: see status"]
    if done.get("undo"):
        lines.append(f"the state before is snapshot {done['undo'][:8]}")
    return "\n".join(lines)


def snapshot_text(snapshot: Json) -> str:
    """One line about a snapshot."""
    name = str(snapshot["number"] or "-")
    taken = datetime.fromtimestamp(snapshot["time_ns"] / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    head = f"{name:>4}  {snapshot['uuid'][:8]}  {taken}  record {snapshot['seq']}"
    what = f"{','.join(snapshot['volumes'])}, {size_text(snapshot['size'])}"
    if snapshot["state"] != "ok":
        why = f": {snapshot['why']}" if snapshot["why"] else ""
        return f"{head}  {what}  {snapshot['state']}{why}"
    words = [f"changed since {size_text(snapshot['changed']['bytes'])}"]
    if snapshot["own"]["regions"]:
        words.append(f"written into it {size_text(snapshot['own']['bytes'])}")
    words += [word for word in ("protected", "writable") if snapshot[word]]
    if snapshot["kind"] != "user":
        words.append(KIND_TEXTS[snapshot["kind"]])
    return f"{head}  {what}  {', '.join(words)}"


def diff_text(found: Json) -> str:
    """A line for each range, and their sum."""
    lines = [f"{r['volume']}  {r['offset']}  {r['length']}" for r in found["ranges"]]
    total = f"{size_text(found['bytes'])} in {count_text(len(lines), 'range')}"
    return "\n".join([*lines, total + (" and more" if found["more"] else "")])


def _client(args: argparse.Namespace) -> AdminClient:
    return AdminClient(find_socket(args.daemon_config, args.socket))


def _call(args: argparse.Namespace, method: str, params: Json, text: Callable[[Json], str]) -> int:
    with _client(args) as client:
        result = client.call(method, params)
    if args.json:
        print_json(result)
    else:
        print(text(result))
    return 0
