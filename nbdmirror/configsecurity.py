"""The part of the configuration that says who may come in: TLS, secrets, access to exports.

Owns the rules of these keys; reads no file: what the files hold is checked by ``edge.secrets`` and
``edge.tls`` when they are loaded. Called by ``configfile``.
"""

from __future__ import annotations

import ipaddress
import os
import re

from nbdmirror import config as c
from nbdmirror.config import AccessConfig, Config, RemoteConfig, TlsConfig, VolumeConfig
from nbdmirror.errors import ConfigError
from nbdmirror.tomltable import Table

CREDENTIAL = "credential:"
"""What stands before the name of a systemd credential, in place of a path."""

_PIN = re.compile(r"(?:sha256:)?([0-9a-fA-F]{64})")
_NAMES_MAX = 1000


def insecure_hint(table: Table) -> str:
    """What makes a listener of this table, that others can reach, acceptable."""
    how = "tls or secret_file" if table.label == "replication" else "tls"
    return (
        f"set {how} in this table, listen on a unix socket or on loopback, or set insecure = true"
    )


def secret_path(table: Table, key: str) -> str:
    """A path, made absolute, or ``credential:NAME``, which stays."""
    text = table.text(key)
    if text.startswith(CREDENTIAL):
        table.checked(key, c.check_name, text.removeprefix(CREDENTIAL))
        return text
    return os.path.normpath(os.path.join(os.path.dirname(table.file), text))


def tls_table(table: Table) -> TlsConfig | None:
    """``tls = { cert, key, client_ca, pins }``: all of it or nothing."""
    inner = _inner(table)
    if inner is None:
        return None
    if "psk" in inner:
        inner.fail("psk", 'is for frontend = "nbdkit"', "use cert, key and client_ca")
    for key in ("cert", "key", "client_ca"):
        if key not in inner:
            inner.fail(key, "missing: both sides prove who they are, or there is no TLS")
    pins = []
    for text in inner.texts("pins", []):
        match = _PIN.fullmatch(text)
        if match is None:
            inner.fail("pins", f"{text[:80]!r} is no SHA-256 digest: 64 hexadecimal digits")
        pins.append(match[1].lower())
    result = TlsConfig(
        cert=secret_path(inner, "cert"),
        key=secret_path(inner, "key"),
        client_ca=secret_path(inner, "client_ca"),
        pins=tuple(pins),
    )
    inner.finish()
    return result


def psk_table(table: Table) -> str | None:
    """``tls = { psk = FILE }`` of the nbdkit front end: a file of ``psktool``'s form."""
    inner = _inner(table)
    if inner is None:
        return None
    if "psk" not in inner:
        hint = 'use tls = { psk = FILE }, or frontend = "native" for certificates'
        inner.fail("psk", "missing: the nbdkit front end has TLS with pre-shared keys", hint)
    path = secret_path(inner, "psk")
    inner.finish()
    return path


def _inner(table: Table) -> Table | None:
    present = "tls" in table
    data = table.table("tls")
    return Table(table.file, f"{table.label}.tls", data) if present else None


def access(table: Table) -> AccessConfig:
    """The keys of ``[[volume]]`` that say who may attach it."""
    names = addresses = None
    if "client_names" in table:
        names = tuple(table.texts("client_names"))
        if len(names) > _NAMES_MAX:
            table.fail("client_names", f"more than {_NAMES_MAX} names")
    if "client_addresses" in table:
        texts = table.texts("client_addresses")
        addresses = tuple(table.checked("client_addresses", _network, text) for text in texts)
    clients_max = None
    if "clients_max" in table:
        clients_max = table.integer("clients_max", 0, 0, 65_536)
    for key in ("client_names", "client_addresses", "clients_max"):
        table.raw(key, None)
    return AccessConfig(table.flag("read_only", False), names, addresses, clients_max)


def _network(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text))
    except ValueError as error:
        raise ConfigError(f"{error}: write an address or a network like 192.0.2.0/24") from None


def check_access(top: Table, config: Config, volume: VolumeConfig) -> None:
    """Names are proved by certificates only; nbdkit tells its plugin neither name nor address."""
    rules, nbd = volume.access, config.nbd
    key = f"volume[{volume.name}]"
    if rules.names is not None and nbd.tls is None:
        top.fail(f"{key}.client_names", "nothing proves a name without [nbd] tls")
    if rules.addresses is not None and nbd.frontend != "native":
        top.fail(f"{key}.client_addresses", 'only frontend = "native" knows addresses')


def check_link(top: Table, config: Config, remote: RemoteConfig) -> None:
    """The data of the volumes does not leave this host in the clear unless that is spelled out."""
    replication = config.replication
    if replication.insecure or replication.tls is not None or replication.secret_file is not None:
        return
    if c.reachable(c.parse_address(remote.address)):
        hint = "set tls, secret_file, or insecure = true in [replication]"
        problem = f"{remote.address} is another host, and the connection would be open"
        top.fail(f"remote[{remote.name}].address", problem, hint)
