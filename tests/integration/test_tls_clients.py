"""TLS for NBD clients: who gets in, and with which word the others do not.

Rows of reliability.md 4.1 (open port, downgrade, STARTTLS injection, secrets) and faults 41 and 42.
Every refusal is shown beside a legitimate client that goes on.
"""

from __future__ import annotations

import importlib
import os
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.cluster import MIB, Cluster, nbdmirror
from tests.integration.pki import Authority, tls_line
from tests.integration.process import wait_until
from tests.integration.rawnbd import DISC, FUA, READ, REP_ACK, RawClient
from tests.integration.test_nbd_endings import request, write
from tests.integration.tools import connect, nbd_error, pattern, requires, run

MakeCluster = Callable[..., Cluster]
STARTTLS = 5
REP_ERR_TLS_REQD = 2**31 + 5
REP_ERR_INVALID = 2**31 + 3
REP_ERR_POLICY = 2**31 + 2


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Another CA, with the same names."""
    made = Authority(tmp_path_factory.mktemp("other") / "ca")
    for node in ("alpha", "beta"):
        made.node(node)
    made.client("laptop")
    return made


def attach(cluster: Cluster, client: Path, volume: str = "data") -> Any:
    """A libnbd handle over TLS with this certificate."""
    nbd = importlib.import_module("nbd")
    handle = nbd.NBD()
    handle.set_tls(nbd.TLS_REQUIRE)
    handle.set_tls_certificates(str(client))
    handle.set_tls_verify_peer(True)
    handle.connect_uri(f"nbds://127.0.0.1:{cluster.primary.nbd_port}/{volume}")
    return handle


def context(client: Path) -> ssl.SSLContext:
    """The same for raw sockets."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.load_verify_locations(client / "ca-cert.pem")
    made.load_cert_chain(client / "client-cert.pem", client / "client-key.pem")
    return made


@pytest.fixture
def served(make_cluster: MakeCluster, authority: Authority) -> Cluster:
    """A primary alone, with TLS on its TCP address and one export for one name."""
    cluster = make_cluster(remotes=(), tcp=True)
    cluster.primary.keys["nbd"] = [tls_line(authority.directory / "alpha")]
    cluster.primary.keys["volume"] = ['client_names = ["laptop"]', "clients_max = 2"]
    cluster.primary.write_config()
    cluster.create()
    cluster.primary.start()
    return cluster


def raw(cluster: Cluster) -> RawClient:
    """A raw client on the TLS address."""
    return RawClient(("127.0.0.1", cluster.primary.nbd_port), timeout=20)


def test_a_client_with_a_certificate_is_served(served: Cluster, authority: Authority) -> None:
    """Data goes both ways over TLS; the unix socket, which its mode guards, stays plain."""
    handle = attach(served, authority.directory / "laptop")
    assert handle.get_tls_negotiated()
    data = pattern(3 * MIB, 1)
    handle.pwrite(data, 4096)
    handle.flush()
    assert handle.pread(3 * MIB, 4096) == data
    assert connect(served.primary.uri()).pread(len(data), 4096) == data
    (volume,) = served.primary.status()["volumes"]
    assert volume["uris"][1].startswith("nbds://")
    security = served.primary.status()["security"]["nbd"]
    assert security["mode"] == "tls"
    assert 824 < (security["expires"] - time.time()) / 86400 < 826


def test_who_sends_no_more_behind_its_goodbye_is_answered(
    served: Cluster, authority: Authority
) -> None:
    """NBD_CMD_DISC, over TLS too: it asks for more than may be on the way to it at a time, and its
    end comes before it has read any of it."""
    handle = connect(served.primary.uri())
    for number in range(64):
        handle.pwrite(pattern(MIB, number), number * MIB)
    tls = context(authority.directory / "laptop")
    tls.check_hostname = False
    with raw(served) as client:
        client.replies(STARTTLS)
        client.wrap(tls, "alpha")
        client.go("data")
        reads = b"".join(request(READ, number, number * MIB, MIB) for number in range(60))
        client.send(reads + write(60, 63 * MIB, b"W" * 4096, FUA) + request(DISC, 0, 0, 0))
        with socket.socket(fileno=os.dup(client.socket.fileno())) as below:
            below.shutdown(socket.SHUT_WR)
        time.sleep(1)  # nothing tells when its end is seen
        assert len(client.receive(60 * (16 + MIB) + 16)) == 60 * (16 + MIB) + 16
    assert handle.pread(4096, 63 * MIB) == b"W" * 4096


def test_nothing_is_told_in_plain_text(served: Cluster) -> None:
    """FORCEDTLS: every option but STARTTLS and ABORT gets TLS_REQD, EXPORT_NAME hangs up."""
    with raw(served) as client:
        for option in (3, 6, 7, 8, 9, 10, 99):
            (reply,) = client.replies(option, b"\0\0\0\4data\0\0")
            assert reply.kind == REP_ERR_TLS_REQD, option
        assert client.replies(2)[-1].kind == REP_ACK
    with raw(served) as client:
        client.option(1, b"data")
        assert client.hung_up()
    with pytest.raises(nbd_error()):
        connect(f"nbd://127.0.0.1:{served.primary.nbd_port}/data")


def test_starttls_twice_or_with_data(served: Cluster, authority: Authority) -> None:
    """nbd.md 1.5: INVALID, and the session goes on."""
    with raw(served) as client:
        assert client.replies(STARTTLS, b"x")[0].kind == REP_ERR_INVALID
        assert client.replies(STARTTLS)[0].kind == REP_ACK
        client.wrap(context(authority.directory / "laptop"), "127.0.0.1")
        assert client.replies(STARTTLS)[0].kind == REP_ERR_INVALID
        assert client.go("data")[-1].kind == REP_ACK
        client.check_usable()


def test_plain_text_behind_starttls_is_never_read_as_tls(
    served: Cluster, authority: Authority
) -> None:
    """Fault 42 (CVE-2021-3716): in one segment or later, it ends the connection, and what was
    injected has no effect."""
    structured = b"IHAVEOPT" + (8).to_bytes(4, "big") + bytes(4)
    with raw(served) as client:
        client.send(b"IHAVEOPT" + STARTTLS.to_bytes(4, "big") + bytes(4) + structured)
        assert client.socket.recv(100) == b"", "not even the answer to STARTTLS"
    with raw(served) as client:
        assert client.replies(STARTTLS)[0].kind == REP_ACK
        client.send(structured)
        assert client.hung_up()
    wait_until("it is told", lambda: any("plain text" in why for why in served.primary.refusals()))
    attach(served, authority.directory / "laptop")


def test_what_was_negotiated_before_tls_is_forgotten(
    make_cluster: MakeCluster, served: Cluster, authority: Authority
) -> None:
    """SET_META_CONTEXT within TLS asks for structured replies anew."""
    with raw(served) as client:
        client.replies(8)
        assert client.replies(STARTTLS)[0].kind == REP_ACK
        client.wrap(context(authority.directory / "laptop"), "127.0.0.1")
        query = b"\0\0\0\4data\0\0\0\1\0\0\0\x0fbase:allocation"
        assert client.replies(10, query)[0].kind == REP_ERR_INVALID


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda ours, theirs: ours.client("late", days=-1), "expired"),
        (lambda ours, theirs: theirs.directory / "laptop", "wrong CA"),
        (lambda ours, theirs: None, "missing certificate"),
    ],
    ids=["expired", "wrong-ca", "none"],
)
def test_bad_certificates_are_refused_by_name(
    served: Cluster,
    authority: Authority,
    stranger: Authority,
    make: Callable[[Authority, Authority], Path | None],
    word: str,
) -> None:
    """Fault 41: no fallback, a clear word, and the right client is served meanwhile."""
    directory = make(authority, stranger)
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.load_verify_locations(authority.directory / "ca.pem")
    if directory is not None:
        made.load_cert_chain(directory / "client-cert.pem", directory / "client-key.pem")
    with raw(served) as client, pytest.raises((OSError, EOFError)):
        assert client.replies(STARTTLS)[0].kind == REP_ACK
        client.wrap(made, "127.0.0.1")
        client.go("data")
    wait_until(word, lambda: any(word in why for why in served.primary.refusals()))
    assert attach(served, authority.directory / "laptop").get_size()


def test_an_export_is_for_those_it_names(served: Cluster, authority: Authority) -> None:
    """Another certificate of the same CA: it sees no export, and a wish for one is POLICY."""
    with raw(served) as client:
        assert client.replies(STARTTLS)[0].kind == REP_ACK
        client.wrap(context(authority.directory / "backup"), "127.0.0.1")
        assert [reply.kind for reply in client.replies(3)] == [REP_ACK]
        assert client.go("data")[-1].kind == REP_ERR_POLICY
    assert any("backup" in why for why in served.primary.refusals())


def test_an_export_has_so_many_clients(served: Cluster, authority: Authority) -> None:
    """``clients_max``; when one leaves there is a place again."""
    laptop = authority.directory / "laptop"
    one, two = attach(served, laptop), attach(served, laptop)
    with pytest.raises(nbd_error(), match="policy"):
        attach(served, laptop)
    two.shutdown()
    wait_until("a place is free", lambda: served.primary.status()["volumes"][0]["clients"] == 1)
    assert attach(served, laptop).get_size() == one.get_size()


def test_a_stalled_tls_handshake_has_a_deadline(served: Cluster, authority: Authority) -> None:
    """Fault 36: silence within TLS is dropped like silence before it."""
    with raw(served) as client:
        assert client.replies(STARTTLS)[0].kind == REP_ACK
        attach(served, authority.directory / "laptop")
        assert client.hung_up()


@pytest.mark.parametrize("reset", [False, True])
def test_who_goes_in_the_middle_of_a_tls_handshake_is_gone(served: Cluster, reset: bool) -> None:
    """Fault 36, I6: nothing is kept of it, however it went."""
    for _ in range(5):
        with raw(served) as client:
            assert client.replies(STARTTLS)[0].kind == REP_ACK
            client.send(b"\x16\x03\x01")  # the first bytes of a hello
            if reset:
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, *bytes(7)]))
    connections = served.primary.status()["connections"]["nbd"]
    wait_until(
        "all are gone",
        lambda: served.primary.status()["connections"]["nbd"]["open"] == 0,
    )
    assert connections["evicted"] == 0
    wait_until("it is told", lambda: any("hung up" in why for why in served.primary.refusals()))


def test_certificates_are_reloaded(
    make_cluster: MakeCluster, authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    """SIGHUP: new connections meet the new certificate, old ones stay; a broken file changes
    nothing."""
    certificate = tmp_path / "cert.pem"
    certificate.write_bytes((authority.directory / "alpha" / "cert.pem").read_bytes())
    (tmp_path / "key.pem").write_bytes((authority.directory / "alpha" / "key.pem").read_bytes())
    (tmp_path / "key.pem").chmod(0o600)
    (tmp_path / "ca.pem").write_bytes((authority.directory / "ca.pem").read_bytes())
    cluster = make_cluster(remotes=(), tcp=True)
    cluster.primary.keys["nbd"] = [tls_line(tmp_path)]
    cluster.primary.write_config()
    cluster.create()
    cluster.primary.start()
    laptop = authority.directory / "laptop"
    old = attach(cluster, laptop)

    def reload(kind: str) -> None:
        before = len(cluster.primary.events())
        cluster.primary.reload()
        wait_until(kind, lambda: kind in str(cluster.primary.events()[before:]))

    certificate.write_text("nonsense")
    reload("reload-failed")
    assert attach(cluster, laptop).get_size()
    for name in ("cert.pem", "key.pem"):
        fresh = (stranger.directory / "alpha" / name).read_bytes()
        (tmp_path / name).write_bytes(fresh)
    reload("reloaded")
    with pytest.raises(nbd_error()):  # the client does not know this CA
        attach(cluster, laptop)
    assert old.pread(512, 0) == bytes(512)


# -- other programs ------------------------------------------------------------------------------


@requires("nbd-client")
def test_nbd_client_speaks_it(served: Cluster, authority: Authority) -> None:
    """Debian's nbd-client, with the options that ``deploy/nbd-client@.service`` gives it."""
    laptop = authority.directory / "laptop"
    argv = ["nbd-client", "-l", "127.0.0.1", str(served.primary.nbd_port)]
    argv += ["-certfile", f"{laptop}/client-cert.pem", "-keyfile", f"{laptop}/client-key.pem"]
    argv += ["-cacertfile", f"{laptop}/ca-cert.pem", "-tlshostname", "127.0.0.1"]
    assert "data" in run(*argv)


@requires("nbdkit")
def test_nbdkit_with_preshared_keys(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """The nbdkit front end: TLS-PSK and nothing but; a key that others can read is refused."""
    keys = tmp_path / "keys.psk"
    keys.write_text(f"laptop:{os.urandom(32).hex()}\n")
    cluster = make_cluster(remotes=(), tcp=True, frontend="nbdkit")
    cluster.primary.keys["nbd"] = [f'tls = {{ psk = "{keys}" }}']
    cluster.primary.keys["volume"] = ["clients_max = 1"]
    cluster.primary.write_config()
    cluster.create()
    keys.chmod(0o644)
    done = nbdmirror("serve", str(cluster.primary.config), timeout=60)
    assert done.code == 2 and "others can read it" in done.err, done
    keys.chmod(0o600)
    cluster.primary.start()

    def attach_with(path: Path) -> Any:
        nbd = importlib.import_module("nbd")
        handle = nbd.NBD()
        handle.set_tls(nbd.TLS_REQUIRE)
        handle.set_tls_psk_file(str(path))
        handle.set_tls_username("laptop")
        handle.connect_uri(f"nbds://127.0.0.1:{cluster.primary.nbd_port}/data")
        return handle

    handle = attach_with(keys)
    handle.pwrite(pattern(MIB, 2), 0)
    assert handle.pread(MIB, 0) == pattern(MIB, 2)
    with pytest.raises(nbd_error()):
        attach_with(keys)  # clients_max
    handle.shutdown()
    other = tmp_path / "other.psk"
    other.write_text(f"laptop:{os.urandom(32).hex()}\n")
    for path in (other, None):
        with pytest.raises(nbd_error()):
            attach_with(path) if path else connect(cluster.primary.uri(tcp=True))
    wait_until("there is a place again", lambda: _attaches(attach_with, keys))
    keys.chmod(0o644)
    cluster.primary.reload()
    failed = wait_until(
        "the reload failed",
        lambda: [e for e in cluster.primary.events() if e["kind"] == "reload-failed"],
    )
    assert "nbd.tls.psk" in failed[0]["why"] and "others can read it" in failed[0]["why"]


def _attaches(attach_with: Callable[[Path], Any], path: Path) -> bool:
    try:
        attach_with(path)
    except nbd_error():
        return False
    return True
