"""The keys that say who may come in: complete, explicit, never a quiet fallback (4.1)."""

from __future__ import annotations

import pytest

from nbdmirror import config as c
from nbdmirror.configfile import parse
from nbdmirror.errors import ConfigError
from tests.unit.test_config import FILE, MINIMAL

TLS = "tls = { cert = 'a.crt', key = 'credential:key', client_ca = '/ca.pem' }\n"
OPEN_NBD = "listen = ['tcp:0.0.0.0:10809']\n"
OPEN_LINK = "listen = 'tcp:0.0.0.0:10810'\n"
REMOTE = "[[remote]]\nname = 'beta'\naddress = 'tcp:192.0.2.2:10810'\n"


def read(*parts: str, volume: str = "") -> c.Config:
    return parse(MINIMAL + volume + "".join(parts), FILE)


def test_tls_opens_an_address_to_others() -> None:
    config = read("[nbd]\n", OPEN_NBD, TLS, "[replication]\n", OPEN_LINK, TLS)
    wanted = c.TlsConfig("/etc/nbdmirror/a.crt", "credential:key", "/ca.pem")
    assert config.nbd.tls == wanted == config.replication.tls
    assert c.uris(config, "data") == ["nbds://0.0.0.0:10809/data"]


def test_a_secret_opens_replication_only() -> None:
    config = read("[replication]\n", OPEN_LINK, "secret_file = 's'\n", REMOTE)
    assert config.replication.secret_file == "/etc/nbdmirror/s"


def test_nbdkit_has_preshared_keys() -> None:
    config = read("[nbd]\n", OPEN_NBD, "frontend = 'nbdkit'\ntls = { psk = 'keys.psk' }\n")
    assert config.nbd.psk_file == "/etc/nbdmirror/keys.psk"


def test_pins_are_digests() -> None:
    pin = "AB" * 32
    line = TLS.replace(" }", f", pins = ['sha256:{pin}'] }}")
    tls = read("[replication]\n", line).replication.tls
    assert tls is not None and tls.pins == (pin.lower(),)


def test_access_of_a_volume() -> None:
    volume = (
        "read_only = true\nclient_names = ['laptop']\nclients_max = 3\n"
        "client_addresses = ['192.0.2.0/24', '2001:db8::1']\n"
    )
    config = read("[nbd]\n", TLS, volume=volume)
    assert config.volumes[0].access == c.AccessConfig(
        True, ("laptop",), ("192.0.2.0/24", "2001:db8::1/128"), 3
    )


# (table and lines, lines of the volume, the key, what else the message says)
BAD = [
    ("[nbd]\n" + OPEN_NBD, "", "nbd.listen", "unencrypted"),
    ("[replication]\n" + OPEN_LINK, "", "replication.listen", "unauthenticated"),
    (REMOTE, "", "remote[beta].address", "would be open"),
    ("[nbd]\ntls = { cert = 'a', key = 'b' }\n", "", "nbd.tls.client_ca", "missing"),
    ("[nbd]\n" + TLS.replace("cert", "crt", 1), "", "nbd.tls.cert", "missing"),
    ("[nbd]\n" + TLS.replace(" }", ", x = 1 }"), "", "nbd.tls.x", "no such key"),
    ("[nbd]\ntls = true\n", "", "nbd.tls", "must be a table"),
    ("[nbd]\ntls = { psk = 'x' }\n", "", "nbd.tls.psk", "nbdkit"),
    ("[nbd]\nfrontend = 'nbdkit'\n" + TLS, "", "nbd.tls.psk", "missing"),
    ("[replication]\n" + TLS.replace(" }", ", pins = ['ab'] }"), "", "tls.pins", "64 hexa"),
    ("[replication]\n" + TLS.replace("credential:key", "credential:../k"), "", "key", "a name"),
    ("[replication]\nsecret_file = 's'\n" + TLS, "", "replication.secret_file", "tls already"),
    ("", "client_names = ['laptop']\n", "volume[data].client_names", "nothing proves"),
    ("", "client_addresses = ['192.0.2.1/24']\n", "client_addresses", "host bits"),
    ("", "client_addresses = ['127.0.0']\n", "client_addresses", "192.0.2.0/24"),
    ("[nbd]\nfrontend = 'nbdkit'\n", "client_addresses = ['::1']\n", "addresses", "native"),
    ("", "clients_max = -1\n", "volume[data].clients_max", "from 0"),
    ("", "read_only = 'yes'\n", "volume[data].read_only", "true or false"),
    ("[limits]\nmemory_bytes_max = '1MiB'\n", "", "limits.memory_bytes_max", "from 128MiB"),
    ("[limits]\nstrangers_max = 0\n", "", "limits.strangers_max", "from 1"),
]


@pytest.mark.parametrize(("added", "volume", "key", "problem"), BAD)
def test_half_a_lock_is_refused(added: str, volume: str, key: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(added, volume=volume)
    assert key in caught.value.message
    assert problem in caught.value.message


def test_the_cure_is_named() -> None:
    for table, cure in (("[nbd]\n" + OPEN_NBD, "tls"), ("[replication]\n" + OPEN_LINK, "secret")):
        with pytest.raises(ConfigError) as caught:
            read(table)
        assert cure in (caught.value.hint or "")
        assert "insecure = true" in (caught.value.hint or "")
    config = read("[replication]\ninsecure = true\n", REMOTE)
    assert config.remotes[0].name == "beta"
