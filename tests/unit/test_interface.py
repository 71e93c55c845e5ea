"""The interface, line by line: what people's files and scripts rely on is there, with its defaults.

Configuration, commands and flags, exit codes, method names, Make targets. The fields of a status
are held by ``tests.integration.test_admin``, on real daemons.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from nbdmirror import config as c
from nbdmirror import errors
from nbdmirror.cli.main import build_parser
from nbdmirror.config import Config
from nbdmirror.configfile import parse
from nbdmirror.engine.methods import METHODS

TREE = Path(__file__).resolve().parents[2]
FILE = "/etc/nbdmirror/db.toml"

EXAMPLE = """
group = "db"                       # ^[A-Za-z0-9._-]{1,64}$, as every name here
node  = "alpha"
state_dir = "/var/lib/nbdmirror/db"

[nbd]
listen = ["unix:/run/nbdmirror/db.nbd", "tcp:127.0.0.1:10809"]
frontend = "native"
# tls = { cert = "alpha.crt", key = "alpha.key", client_ca = "ca.crt" }

[admin]
socket  = "/run/nbdmirror/db.sock"
metrics = "tcp:127.0.0.1:9810"

[log]
size = "1GiB"
mode = "disk"
on_full = "dcm"
# path = "/fast/db.log"

[[volume]]
name = "data"
size = "100GiB"
facets = ["/srv/db/data.img"]
region_size = "64KiB"

[[remote]]
name = "beta"
address = "tcp:192.0.2.2:10810"
mode = "async"
compression = "lz4"
# max_rate = "50MiB"
# apply_delay = "0s"

[replication]
listen = "tcp:0.0.0.0:10810"
secret_file = "/etc/nbdmirror/db.secret"
"""

# What may be left out of the example, and what it then is.
DEFAULTS = [
    ('frontend = "native"', lambda config: config.nbd.frontend == "native"),
    ('metrics = "tcp:127.0.0.1:9810"', lambda config: config.admin.metrics is None),
    ('size = "1GiB"', lambda config: config.log.size == c.GIB),
    ('mode = "disk"', lambda config: config.log.mode == "disk"),
    ('on_full = "dcm"', lambda config: config.log.on_full == "dcm"),
    ('region_size = "64KiB"', lambda config: config.volumes[0].region_size == 64 * c.KIB),
    ('mode = "async"', lambda config: config.remotes[0].mode == "async"),
    ('compression = "lz4"', lambda config: config.remotes[0].compression == "off"),
]
# Other values that the interface names, and what they mean.
CHOICES = [
    ('frontend = "native"', 'frontend = "nbdkit"', lambda config: config.nbd.frontend == "nbdkit"),
    ('"tcp:127.0.0.1:10809"', '"tcp:[::1]:10809"', lambda config: "[::1]" in config.nbd.listen[1]),
    ("# tls", "tls", lambda config: config.nbd.tls.client_ca == "/etc/nbdmirror/ca.crt"),
    ('on_full = "dcm"', 'on_full = "block"', lambda config: config.log.on_full == "block"),
    ("# path", "path", lambda config: config.log.path == "/fast/db.log"),
    (
        'mode = "disk"',
        'mode = "spill"\nspill_threshold = "64MiB"',
        lambda config: (config.log.mode, config.log.spill_threshold) == ("spill", 64 * c.MIB),
    ),
    (
        'mode = "disk"',
        'mode = "spill"',
        lambda config: config.log.spill_threshold == 64 * c.MIB,
    ),
    ('size = "100GiB"', "size = 512", lambda config: config.volumes[0].size == 512),
    ('size = "100GiB"', 'size = "8KiB"', lambda config: config.volumes[0].size == 8 * c.KIB),
    ('size = "100GiB"', 'size = "8MiB"', lambda config: config.volumes[0].size == 8 * c.MIB),
    ('size = "100GiB"', 'size = "2TiB"', lambda config: config.volumes[0].size == 2 * c.TIB),
    ('compression = "lz4"', 'compression = "off"', lambda config: True),
    ('mode = "async"', 'mode = "sync"', lambda c: c.remotes[0].on_link_loss == "continue"),
    (
        'mode = "async"',
        'mode = "sync"\non_link_loss = "fail"',
        lambda config: config.remotes[0].on_link_loss == "fail",
    ),
    ("# max_rate", "max_rate", lambda config: config.remotes[0].max_rate == 50 * c.MIB),
    ("# apply_delay", "apply_delay", lambda config: config.remotes[0].apply_delay == 0.0),
    (
        'secret_file = "/etc/nbdmirror/db.secret"',
        'tls = { cert = "a.crt", key = "a.key", client_ca = "ca.crt" }',
        lambda config: config.replication.tls.cert == "/etc/nbdmirror/a.crt",
    ),
]

# The words of a command, and its flags and arguments. A role has no command before its issue.
COMMANDS = {
    "check": "CONFIG",
    "create": "CONFIG --role --force",
    "serve": "CONFIG",
    "status": "--watch",
    "wait": "--until --remote --timeout",
    "resync": "R --full --wait",
    "verify": "R --repair --wait",
    "pause": "R",
    "resume": "R",
    "facet list": "",
    "facet offline": "PATH",
    "facet online": "PATH",
    "facet add": "PATH",
    "facet remove": "PATH",
    "remote list": "",
    "remote add": "NAME ADDRESS",
    "remote remove": "NAME",
    "snapshot create": "",
    "snapshot list": "",
    "snapshot delete": "SNAP",
    "snapshot refresh": "SNAP",
    "snapshot export": "SNAP",
    "restore": "SNAP",
    "events": "--since",
    "dump": "CONFIG",
    "attach": "URI /dev/nbdN --connections --dead-timeout",
    "detach": "/dev/nbdN",
    "demo": "",
}
OFFLINE = ("check", "create", "serve", "dump", "attach", "detach", "demo")


@pytest.mark.parametrize(("line", "holds"), DEFAULTS, ids=[line for line, _ in DEFAULTS])
def test_a_key_that_is_left_out_has_its_documented_default(line: str, holds: Any) -> None:
    assert line in EXAMPLE
    assert parse(EXAMPLE, FILE)
    assert holds(parse(EXAMPLE.replace(line, "", 1), FILE))


@pytest.mark.parametrize(("old", "new", "holds"), CHOICES, ids=[new for _, new, _ in CHOICES])
def test_every_value_that_the_interface_names_is_taken(old: str, new: str, holds: Any) -> None:
    assert old in EXAMPLE
    assert holds(parse(EXAMPLE.replace(old, new, 1), FILE))


def test_names_are_what_the_interface_says() -> None:
    for name in ("a", "A-Z.a_z-09", "x" * 64):
        assert parse(EXAMPLE.replace('"db" ', f'"{name}" ', 1), FILE).group == name
    for name in ("", "x" * 65, "a b", "a/b", "\\u00e9"):
        with pytest.raises(errors.ConfigError, match="group"):
            parse(EXAMPLE.replace('"db" ', f'"{name}" ', 1), FILE)


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return parser._actions


def _parser(words: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = build_parser()
    for word in words.split():
        (choices,) = [a.choices for a in _actions(parser) if isinstance(a.choices, dict)]
        parser = choices[word]
    return parser


@pytest.mark.parametrize(("words", "wanted"), COMMANDS.items(), ids=COMMANDS)
def test_every_command_has_its_flags_and_arguments(words: str, wanted: str) -> None:
    """And ``--json`` if it prints, and ``-c`` and ``-s`` if it talks to a daemon."""
    actions = _actions(_parser(words))
    there = {option for action in actions for option in action.option_strings}
    there |= {str(action.metavar or action.dest) for action in actions}
    expected = set(wanted.split())
    if words != "serve":
        expected.add("--json")
    if words not in OFFLINE or words == "attach":
        expected |= {"-c", "-s"}
    assert expected <= there


def test_choices_and_defaults_of_flags() -> None:
    parse_args = build_parser().parse_args
    assert parse_args(["create", "x"]).role == "primary"
    assert parse_args(["create", "x", "--role", "secondary"]).role == "secondary"
    for until in ("in-sync", "connected", "consistent"):
        assert parse_args(["wait", "--until", until]).until == until
    for what in ("superblock", "log", "dcm", "active"):
        assert parse_args(["dump", what, "x"]).what == what
    attach = parse_args(["attach"])
    assert (attach.connections, attach.dead_timeout) == (4, 60.0)


def test_methods_are_named_as_the_commands() -> None:
    for words in COMMANDS:
        if words not in OFFLINE:
            assert words.replace(" ", ".") in METHODS


def test_exit_codes() -> None:
    """Held by whole commands in ``tests.unit.cli`` and ``tests.integration.test_admin``."""
    codes = {
        errors.NbdmirrorError: 1,
        errors.StateError: 1,
        errors.UsageError: 2,
        errors.ConfigError: 2,
        errors.TimedOut: 3,
        errors.Refused: 4,
        errors.NoDaemon: 5,
    }
    assert {kind: kind.exit_code for kind in codes} == codes


def test_make_targets() -> None:
    text = (TREE / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", text, re.MULTILINE))
    assert {"run", "test", "check", "sim", "guest", "bench", "clean"} <= targets
    assert {"run", "test"} <= set(re.findall(r"#   make ([a-z]+) ", text))


def _default(config: Config, key: str) -> Any:
    table, _, name = key.partition(".")
    made = {"volume": config.volumes[:1], "remote": config.remotes[:1]}.get(table)
    value: Any = made[0] if made else getattr(config, table)
    assert name in [one.name for one in fields(value)]
    return getattr(value, name)


def test_the_guide_tells_the_defaults_that_there_are() -> None:
    """``deploy/README.md``, tuning: `table.key` | default | when to change it."""
    minimal = parse(re.sub(r"(?m)^(?:region_size|compression|metrics).*$", "", EXAMPLE), FILE)
    told = 0
    guide = (TREE / "deploy" / "README.md").read_text()
    for line in guide.partition("\n## Tuning\n")[2].partition("\n## ")[0].splitlines():
        match = re.match(r"\| (`[a-z]+\.[a-z_]+`(?:, `[a-z_.]+`)*) \| ([^|]+) \|", line)
        if match is None:
            continue
        keys = re.findall(r"`([a-z_.]+)`", match[1])
        table = keys[0].partition(".")[0]
        for key, text in zip(keys, match[2].split(", "), strict=True):
            found = _default(minimal, key if "." in key else f"{table}.{key}")
            assert found is None or text.strip("` ") in _texts(found), f"{key}: {text}, {found}"
            told += 1
    assert told > 10


def _texts(value: object) -> list[str]:
    """How the guide may write a value."""
    if isinstance(value, str):
        return [value]
    assert isinstance(value, int | float)
    units = {"GiB": c.GIB, "MiB": c.MIB, "KiB": c.KIB}
    sizes = [f"{value / size:g} {unit}" for unit, size in units.items()]
    return [f"{value:g}", f"{value:g} s", *sizes]
