"""The commands that need no running daemon: check, create, serve, dump, demo, attach, detach.

Owns their output only; the work is done by ``edge``, imported when it is needed so that a status
does not load a server. Called by ``main``.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import stat
from collections.abc import Mapping

from nbdmirror.cli import online
from nbdmirror.cli.output import print_json, print_json_line, teller
from nbdmirror.cli.render import Json, pairs_text, size_text
from nbdmirror.config import Config, uris
from nbdmirror.configfile import check_files, load
from nbdmirror.errors import UsageError


def check(args: argparse.Namespace) -> int:
    """``check``: validates, and prints what would be served."""
    from nbdmirror.edge.security import check_security

    config = load(args.config)
    check_files(config)
    check_security(config)
    if args.json:
        data = dataclasses.asdict(config)
        for volume in data["volumes"]:
            volume["uris"] = uris(config, volume["name"])
        print_json(data)
    else:
        print("\n".join(_config_lines(config)))
    return 0


def create(args: argparse.Namespace) -> int:
    """``create``: makes the state of a node; exit 4 if some is there and no --force."""
    from nbdmirror.edge.create import create as create_state

    config = load(args.config)
    check_files(config)
    create_state(config, args.role, args.force)
    data: Json = {
        "group": config.group,
        "node": config.node,
        "role": args.role,
        "state_dir": config.state_dir,
    }
    if args.json:
        print_json(data)
    else:
        print(f"{config.group} on {config.node}: created as {args.role} in {config.state_dir}")
        print(f"next: nbdmirror serve {args.config}")
    return 0


def serve(args: argparse.Namespace) -> int:
    """``serve``: the daemon, in the foreground."""
    from nbdmirror.edge.daemon import serve as serve_config

    return serve_config(args.config)


def dump(args: argparse.Namespace) -> int:
    """``dump``: the state of a stopped node; one object, or one a line where there are many."""
    from nbdmirror.edge.dump import dump as dump_state

    data = dump_state(args.what, load(args.config))
    if isinstance(data, Mapping):
        if args.json:
            print_json(data)
        else:
            print("\n".join(pairs_text(dict(data))))
        return 0
    for item in data:
        if args.json:
            print_json_line(item)
        else:
            print(" ".join(f"{key}={value}" for key, value in item.items()))
    return 0


def demo(args: argparse.Namespace) -> int:
    """``demo``: two nodes on this machine and a tour of the main job."""
    from nbdmirror.cli.demo import demo as run_demo

    return run_demo(teller(args.json))


def attach(args: argparse.Namespace) -> int:
    """``attach``: a volume as /dev/nbdN; URI and device may each be left out."""
    from nbdmirror.edge.attach import attach as attach_device

    if args.uri is not None and args.uri.startswith("/dev/"):
        if args.device is not None:
            raise UsageError(f"{args.uri} and {args.device} are both devices")
        args.uri, args.device = None, args.uri
    if args.uri is None:
        args.uri = online.only_uri(args)
    tell = teller(args.json)
    return attach_device(
        args.uri, tell, args.device, args.connections, args.dead_timeout, args.timeout
    )


def detach(args: argparse.Namespace) -> int:
    """``detach``: gives a device back."""
    from nbdmirror.edge.attach import detach as detach_device

    return detach_device(args.device, teller(args.json), force=args.force)


def _config_lines(config: Config) -> list[str]:
    log = config.log
    spill = f" past {size_text(log.spill_threshold)}" if log.mode == "spill" else ""
    lines = [
        f"{config.path}: good",
        f"group {config.group}, node {config.node}, state in {config.state_dir}",
        f"admin socket {config.admin.socket}",
        f"log {size_text(log.size)}, mode {log.mode}{spill}, on_full {log.on_full}"
        + (f", at {log.path}" if log.path else ""),
    ]
    for volume in config.volumes:
        size, region_size = size_text(volume.size), size_text(volume.region_size)
        lines.append(f"volume {volume.name}: {size}, regions of {region_size}")
        lines += [f"  uri {uri}" for uri in uris(config, volume.name)]
        lines += [f"  facet {path}: {_file_kind(path)}" for path in volume.facets]
    for remote in config.remotes:
        lines.append(
            f"remote {remote.name}: {remote.address}, {remote.mode}, "
            f"compression {remote.compression}"
        )
    if config.replication.listen:
        lines.append(f"replication taken at {config.replication.listen}")
    return lines


def _file_kind(path: str) -> str:
    if not os.path.exists(path):
        return "will be made"
    return "block device" if stat.S_ISBLK(os.stat(path).st_mode) else "file"
