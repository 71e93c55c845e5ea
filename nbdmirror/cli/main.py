"""The ``nbdmirror`` command: arguments to a function, exceptions to a message and an exit code.

Owns the command line's shape. The commands are in ``online``, ``snapshot`` and ``local``.

Exit codes: 0 done; 1 failed; 2 usage or configuration; 3 timed out; 4 refused; 5 no daemon.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from nbdmirror import __version__
from nbdmirror.cli import facets, local, online, snapshot
from nbdmirror.cli.output import discard_output
from nbdmirror.errors import ConfigError, NbdmirrorError, UsageError, os_error_text
from nbdmirror.tomltable import parse_duration

CONDITIONS = ("in-sync", "connected", "consistent", "verified")

Run = Callable[[argparse.Namespace], int]

EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UsageError, so that all messages look the same."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see: {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may have what the locale has not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _run(arguments)
        _flush()
        return code
    except NbdmirrorError as error:
        return _report(error.message, error.hint, error.exit_code)
    except BrokenPipeError:
        discard_output()  # the reader of a pipe, as ``head``, has enough
        return 0
    except OSError as error:
        return _report(os_error_text(error), None, NbdmirrorError.exit_code)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _run(arguments: Sequence[str] | None) -> int:
    args = build_parser().parse_args(arguments)
    run: Run | None = getattr(args, "run", None)
    if run is None:
        raise UsageError("a command is needed", hint="see: nbdmirror --help")
    if not args.talks and (args.daemon_config or args.socket):
        raise UsageError(f"{args.command} does not talk to a daemon: no -c and no -s")
    return run(args)


def _flush() -> None:
    if sys.stdout is not None:  # None where a caller closed it: >&-
        sys.stdout.flush()


def _report(message: str, hint: str | None, exit_code: int) -> int:
    try:
        _flush()
    except BrokenPipeError:
        discard_output()
    if sys.stderr is not None:  # 2>&-: what is meant for a person is not for who reads stdout
        try:
            print(f"nbdmirror: {message}" + (f"\n  {hint}" if hint else ""), file=sys.stderr)
            sys.stderr.flush()
        except BrokenPipeError:
            discard_output(sys.stderr)
    return exit_code


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="nbdmirror", description="A userspace block device replicator.")
    parser.add_argument("--version", action="version", version=f"nbdmirror {__version__}")
    _daemon_options(parser, None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    _add_local(commands)
    _add_online(commands)
    _add_attach(commands)
    return parser


def _daemon_options(parser: argparse.ArgumentParser, default: object) -> None:
    parser.add_argument(
        "-c", dest="daemon_config", metavar="CONFIG", default=default, help="the daemon of CONFIG"
    )
    parser.add_argument(
        "-s", dest="socket", metavar="SOCKET", default=default, help="the daemon at SOCKET"
    )


def _command(
    commands: argparse._SubParsersAction[Parser],
    name: str,
    run: Run,
    *,
    talks: bool,
    json: bool = True,
) -> Parser:
    """A command whose help is the docstring of its function."""
    text = (run.__doc__ or "").partition(": ")[2]
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run, talks=talks)
    if talks:
        # SUPPRESS keeps what was given before the command.
        _daemon_options(parser, argparse.SUPPRESS)
    if json:
        parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_local(commands: argparse._SubParsersAction[Parser]) -> None:
    _command(commands, "check", local.check, talks=False).add_argument("config", metavar="CONFIG")
    create = _command(commands, "create", local.create, talks=False)
    create.add_argument("config", metavar="CONFIG")
    create.add_argument("--role", choices=("primary", "secondary"), default="primary")
    create.add_argument("--force", action="store_true", help="overwrite state that is there")
    serve = _command(commands, "serve", local.serve, talks=False, json=False)
    serve.add_argument("config", metavar="CONFIG")
    dump = _command(commands, "dump", local.dump, talks=False)
    dump.add_argument("what", choices=("superblock", "log", "dcm", "active"))
    dump.add_argument("config", metavar="CONFIG")
    _command(commands, "demo", local.demo, talks=False)


def _add_online(commands: argparse._SubParsersAction[Parser]) -> None:
    status = _command(commands, "status", online.status, talks=True)
    status.add_argument("--watch", action="store_true", help="again every second")
    wait = _command(commands, "wait", online.wait, talks=True)
    wait.add_argument(
        "--until", required=True, choices=CONDITIONS, help="verified: no verify wanted or running"
    )
    wait.add_argument("--remote", metavar="R", help="only this remote; default: all")
    _timeout_option(wait)
    resync = _command(commands, "resync", online.resync, talks=True)
    resync.add_argument("remote", metavar="R")
    resync.add_argument("--full", action="store_true", help="every region, not only the marked")
    resync.add_argument("--wait", action="store_true", help="until the remote is in sync")
    _timeout_option(resync)
    verify = _command(commands, "verify", online.verify, talks=True)
    verify.add_argument("remote", metavar="R")
    verify.add_argument("--repair", action="store_true", help="send what differs")
    verify.add_argument("--wait", action="store_true", help="until all is compared (and repaired)")
    _timeout_option(verify)
    for name, run in (("pause", online.pause), ("resume", online.resume)):
        _command(commands, name, run, talks=True).add_argument("remote", metavar="R")
    _add_remote(commands)
    _add_facet(commands)
    _add_log(commands)
    _add_apply(commands)
    _add_snapshot(commands)
    _add_restore(commands)
    events = _command(commands, "events", online.events, talks=True)
    events.add_argument("--since", type=int, default=0, metavar="CURSOR", help="only newer events")
    events.add_argument("--no-follow", dest="follow", action="store_false", help="only the past")


def _add_remote(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "lists, adds and removes remotes"
    parser = commands.add_parser("remote", help=text, description=text)
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", parser_class=Parser, required=True
    )
    _command(actions, "list", online.remote_list, talks=True)
    add = _command(actions, "add", online.remote_add, talks=True)
    add.add_argument("name", metavar="NAME")
    add.add_argument("address", metavar="ADDRESS", help="tcp:HOST:PORT")
    add.add_argument("--mode", default="async", help="async (the default) or sync")
    add.add_argument("--on-link-loss", metavar="POLICY", help="continue, hold or fail (sync)")
    _command(actions, "remove", online.remote_remove, talks=True).add_argument(
        "name", metavar="NAME"
    )


def _add_log(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "moves the log"
    parser = commands.add_parser("log", help=text, description=text)
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", parser_class=Parser, required=True
    )
    replace = _command(actions, "replace", facets.log_replace, talks=True)
    replace.add_argument("path", metavar="PATH", help="a file that does not exist yet")


def _add_facet(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "lists and changes the local facets"
    parser = commands.add_parser("facet", help=text, description=text)
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", parser_class=Parser, required=True
    )
    _command(actions, "list", facets.listing, talks=True)
    _command(actions, "offline", facets.offline, talks=True).add_argument("path", metavar="PATH")
    _command(actions, "remove", facets.remove, talks=True).add_argument("path", metavar="PATH")
    online = _command(actions, "online", facets.online, talks=True)
    online.add_argument("path", metavar="PATH")
    add = _command(actions, "add", facets.add, talks=True)
    add.add_argument("volume", metavar="VOLUME")
    add.add_argument("path", metavar="PATH")
    replace = _command(actions, "replace", facets.replace, talks=True)
    replace.add_argument("path", metavar="PATH")
    replace.add_argument("new", metavar="NEW", nargs="?", help="default: a new disk at PATH")
    for one in (online, add, replace):
        one.add_argument("--wait", action="store_true", help="until the facet is synchronised")
        _timeout_option(one)


def _add_apply(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "freezes or thaws a secondary's facets"
    parser = commands.add_parser("apply", help=text, description=text)
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", parser_class=Parser, required=True
    )
    _command(actions, "freeze", online.freeze, talks=True)
    thaw = _command(actions, "thaw", online.thaw, talks=True)
    thaw.add_argument("--now", action="store_true", help="also what a delay holds back")


def _add_snapshot(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "takes, lists, compares, exports and deletes snapshots"
    parser = commands.add_parser("snapshot", help=text, description=text)
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", parser_class=Parser, required=True
    )
    create = _command(actions, "create", snapshot.create, talks=True)
    create.add_argument("volume", nargs="?", metavar="VOLUME", help="default: all, at one point")
    create.add_argument("--protect", action="store_true", help="the last to go when space ends")
    _command(actions, "list", snapshot.list_all, talks=True)
    diff = _command(actions, "diff", snapshot.diff, talks=True)
    diff.add_argument("snapshot", metavar="SNAP", help="its number, or the uuid's first digits")
    diff.add_argument("until", nargs="?", metavar="SNAP", help="default: now")
    diff.add_argument("--volume", metavar="VOLUME", help="only this volume")
    delete = _command(actions, "delete", snapshot.delete, talks=True)
    delete.add_argument("snapshot", metavar="SNAP")
    delete.add_argument("--everywhere", action="store_true", help="on the secondaries too")
    refresh = _command(actions, "refresh", snapshot.refresh, talks=True)
    refresh.add_argument("snapshot", metavar="SNAP")
    export = _command(actions, "export", snapshot.export, talks=True)
    export.add_argument("snapshot", metavar="SNAP")
    export.add_argument("--writable", action="store_true", help="clients may write into it")


def _add_restore(commands: argparse._SubParsersAction[Parser]) -> None:
    restore = _command(commands, "restore", snapshot.restore, talks=True)
    restore.add_argument("snapshot", metavar="SNAP", help="its number, or the uuid's first digits")
    restore.add_argument("--volume", metavar="VOLUME", help="only this one of its volumes")
    restore.add_argument(
        "--while-attached", action="store_true", help="though clients are attached"
    )
    restore.add_argument(
        "--no-keep", dest="keep", action="store_false", help="no snapshot of the state before"
    )
    restore.add_argument(
        "--force",
        action="store_true",
        help="though a full comparison follows, or a delayed secondary first applies all it has",
    )
    changed = _command(commands, "changed", snapshot.changed, talks=True)
    changed.add_argument("volume", metavar="VOLUME")
    changed.add_argument("ranges", nargs="+", metavar="OFFSET+LENGTH")
    changed.add_argument("--facet", metavar="PATH", help="the one written to (default: the first)")
    changed.add_argument("--force", action="store_true", help="though it ends snapshots")


def _add_attach(commands: argparse._SubParsersAction[Parser]) -> None:
    attach = _command(commands, "attach", local.attach, talks=True)
    attach.add_argument("uri", nargs="?", metavar="URI", help="default: the daemon's only volume")
    attach.add_argument("device", nargs="?", metavar="/dev/nbdN", help="default: a free one")
    attach.add_argument("--connections", type=int, default=4, metavar="N")
    attach.add_argument("--dead-timeout", type=_seconds, default=60.0, metavar="S")
    attach.add_argument("--timeout", type=_seconds, metavar="S", help="of one request")
    detach = _command(commands, "detach", local.detach, talks=False)
    detach.add_argument("device", metavar="/dev/nbdN")
    detach.add_argument("--force", action="store_true", help="though it is in use or not safe")


def _timeout_option(parser: Parser) -> None:
    parser.add_argument("--timeout", type=_seconds, metavar="S", help="seconds, or 5m; then exit 3")


def _seconds(text: str) -> float:
    try:
        return parse_duration(text + "s" if text[-1:].isdigit() else text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(error.message) from None
