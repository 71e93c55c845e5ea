"""What secures the link between nodes: certificates or a secret, and which word says what is wrong.

Rows of reliability.md 4.1 (downgrade, replication auth, secrets) and fault 41. Nothing goes over in
the clear, and nobody falls back to that.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.cluster import MIB, Cluster, nbdmirror
from tests.integration.pki import Authority, tls_line
from tests.integration.process import wait_until
from tests.integration.tools import connect, pattern

MakeCluster = Callable[..., Cluster]


def secure(cluster: Cluster, **lines: str) -> None:
    """Gives each node its line in ``[replication]``."""
    for node in cluster.nodes:
        node.keys["replication"] = [lines[node.name]]
        node.write_config()


@pytest.fixture
def secret(tmp_path: Path) -> Iterator[Path]:
    """A file with a secret."""
    path = tmp_path / "secret"
    path.write_text(os.urandom(32).hex() + "\n")
    path.chmod(0o600)
    yield path


def secret_line(path: Path) -> str:
    return f'secret_file = "{path}"'


def check_replicates(cluster: Cluster) -> None:
    handle = connect(cluster.primary.uri())
    handle.pwrite(pattern(MIB, 7), 0)
    handle.flush()
    cluster.check_in_sync()


def test_replication_with_certificates(make_cluster: MakeCluster, authority: Authority) -> None:
    """Mutual TLS, with each other's key pinned."""
    cluster = make_cluster()
    alpha, beta = authority.directory / "alpha", authority.directory / "beta"
    secure(
        cluster,
        alpha=tls_line(alpha, pins=(authority.pin(beta / "cert.pem"),)),
        beta=tls_line(beta, pins=("sha256:" + authority.pin(alpha / "cert.pem"),)),
    )
    cluster.start()
    check_replicates(cluster)
    with _capture(cluster) as seen:
        check_replicates(cluster)
    assert b"NMF1" not in seen()


@contextlib.contextmanager
def _capture(cluster: Cluster) -> Iterator[Callable[[], bytes]]:
    """What a third party sees on the wire: the proxy's side."""
    taken = bytearray()
    cluster.proxy.tap = taken.extend
    try:
        yield lambda: bytes(taken)
    finally:
        cluster.proxy.tap = None
    assert taken, "nothing went over the wire"


def test_replication_with_a_secret(make_cluster: MakeCluster, secret: Path) -> None:
    """Proved by the secret, and unreadable on the way."""
    cluster = make_cluster()
    secure(cluster, alpha=secret_line(secret), beta=secret_line(secret))
    cluster.start()
    with _capture(cluster) as seen:
        check_replicates(cluster)
    assert b"NMF1" not in seen() and pattern(MIB, 7)[:64] not in seen()
    text = " ".join(node.daemon.output(1000) + str(node.status()) for node in cluster.nodes)
    assert secret.read_text().strip() not in text


def why_not(cluster: Cluster, word: str) -> str:
    """The remote's state says ``refused`` with this word."""
    entry = cluster.primary.until(
        f"is refused: {word}", lambda r: word in str(r["why"]) and r["state"] == "refused"
    )
    return str(entry["why"])


def test_another_secret_is_refused(make_cluster: MakeCluster, secret: Path, tmp_path: Path) -> None:
    """Both sides say so; the right one is let in when it comes."""
    other = tmp_path / "other"
    other.write_text("x" * 40)
    other.chmod(0o600)
    cluster = make_cluster()
    secure(cluster, alpha=secret_line(other), beta=secret_line(secret))
    cluster.start(synced=False)
    why_not(cluster, "wrong secret")
    beta = cluster.secondary
    wait_until("beta is told", lambda: any("wrong secret" in why for why in beta.refusals()))
    other.write_bytes(secret.read_bytes())
    cluster.primary.reload()
    cluster.primary.ok("resync", "beta")
    cluster.check_in_sync()


@pytest.mark.parametrize(
    ("alpha", "beta", "word"),
    [
        (("ours", "alpha", 825), ("theirs", "beta", 825), "wrong CA"),
        (("ours", "alpha", 825), ("ours", "gamma", 825), "wrong name"),
        (("ours", "alpha", 825), ("ours", "beta", -1), "expired"),
        (("other group", "alpha", 825), ("ours", "beta", 825), "wrong name"),
        (("ours", "gamma", 825), ("ours", "beta", 825), "gamma says that it is 'alpha'"),
    ],
    ids=["wrong-ca", "wrong-name", "expired", "other-group", "impostor"],
)
def test_peers_are_refused_by_name(
    make_cluster: MakeCluster,
    tmp_path: Path,
    alpha: tuple[str, str, int],
    beta: tuple[str, str, int],
    word: str,
) -> None:
    """Fault 41 on the link; F6: the name is the certificate's, never the address."""
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")

    def directory(whose: str, name: str, days: int) -> Path:
        if whose == "other group":
            return ours.node(name, group="web", days=days)
        return (theirs if whose == "theirs" else ours).node(name, days=days)

    cluster = make_cluster()
    ca = ours.directory / "ca.pem"
    secure(
        cluster,
        alpha=tls_line(directory(*alpha), ca=ca),
        beta=tls_line(directory(*beta), ca=ca),
    )
    cluster.start(synced=False)
    why_not(cluster, word)


def test_an_expired_primary_is_refused(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """TLS 1.3 tells the client nothing of it: the secondary's event has the word, the primary's
    state says where to look."""
    ours = Authority(tmp_path / "ours")
    cluster = make_cluster()
    secure(cluster, alpha=tls_line(ours.node("alpha", days=-1)), beta=tls_line(ours.node("beta")))
    cluster.start(synced=False)
    why_not(cluster, "hung up")
    assert any("expired" in why for why in cluster.secondary.refusals())


def test_an_unpinned_key_is_refused(make_cluster: MakeCluster, authority: Authority) -> None:
    """A certificate of the right CA with the right name, and another key."""
    cluster = make_cluster()
    alpha, beta = authority.directory / "alpha", authority.directory / "beta"
    pins = (authority.pin(beta / "cert.pem"),)
    secure(cluster, alpha=tls_line(alpha), beta=tls_line(beta, pins=pins))
    cluster.start(synced=False)
    why_not(cluster, "wrong key")


def test_a_plain_primary_gets_nothing_from_a_secured_secondary(
    make_cluster: MakeCluster, secret: Path
) -> None:
    """No fallback in either direction: the engine's frames are not even looked at."""
    cluster = make_cluster()
    secure(cluster, alpha="insecure = true", beta=secret_line(secret))
    cluster.start(synced=False)
    wait_until("beta refuses", lambda: cluster.secondary.refusals())
    assert cluster.primary.remote()["state"] != "synchronised"
    cluster.primary.stop()
    secure(cluster, alpha=secret_line(secret), beta=secret_line(secret))
    cluster.primary.start()
    cluster.check_in_sync()


@pytest.mark.parametrize(
    ("alpha", "beta"),
    [("secret", "tls"), ("tls", "secret"), ("open", "tls"), ("tls", "open"), ("secret", "open")],
)
def test_another_kind_of_proof_shows_on_the_primary(
    make_cluster: MakeCluster, secret: Path, authority: Authority, alpha: str, beta: str
) -> None:
    """Fault 41: who looks at the primary alone sees that the two do not mean the same."""

    def line(name: str, kind: str) -> str:
        if kind == "open":
            return "insecure = true"
        return secret_line(secret) if kind == "secret" else tls_line(authority.directory / name)

    cluster = make_cluster()
    secure(cluster, alpha=line("alpha", alpha), beta=line("beta", beta))
    cluster.start(synced=False)
    words = ("no common ground", "kind of proof", "closed the connection", "not TLS")
    cluster.primary.until(
        "says what is wrong", lambda one: any(word in str(one["why"]) for word in words)
    )


def test_another_kind_of_proof_waits_for_a_restart(
    make_cluster: MakeCluster, secret: Path, authority: Authority
) -> None:
    """SIGHUP with ``tls`` in the place of ``secret_file``: told, and not half taken over."""
    cluster = make_cluster()
    secure(cluster, alpha=secret_line(secret), beta=secret_line(secret))
    cluster.start()
    certificates = {name: tls_line(authority.directory / name) for name in ("alpha", "beta")}
    secure(cluster, **certificates)
    alpha = cluster.primary
    alpha.reload()
    told = wait_until("reloaded", lambda: [e for e in alpha.events() if e["kind"] == "reloaded"])
    assert told[-1]["needs_restart"] == ["replication"]
    assert alpha.status()["security"]["replication"]["mode"] == "secret"
    cluster.proxy.refuse()
    cluster.primary.until("lost its link", lambda one: one["link"] != "connected")
    cluster.proxy.heal()
    check_replicates(cluster)
    for node in cluster.nodes:
        node.stop()
        node.start()
    check_replicates(cluster)
    assert cluster.primary.status()["security"]["replication"]["mode"] == "tls"


def test_a_secured_primary_sends_nothing_in_the_clear(
    make_cluster: MakeCluster, secret: Path
) -> None:
    """A listener without TLS gets a TLS hello, and then nothing."""
    cluster = make_cluster(proxied=False)
    secure(cluster, alpha=secret_line(secret), beta="insecure = true")
    cluster.create()
    beta = cluster.secondary
    with socket.create_server(("127.0.0.1", beta.replication_port)) as server:
        server.settimeout(20)
        cluster.primary.start()
        peer, _ = server.accept()
        with peer:
            peer.settimeout(20)
            first = peer.recv(4096)
            assert first[:1] == b"\x16" and b"NMF1" not in first  # a TLS handshake record
            peer.sendall(b"NMF1" + bytes(36))
            with contextlib.suppress(ConnectionError):
                assert b"NMF1" not in peer.recv(1 << 16)


@pytest.mark.parametrize(
    ("break_it", "word"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.chmod(0o644), "others can read it"),
        (lambda path: path.write_text("short"), "at least 32"),
    ],
    ids=["missing", "mode", "short"],
)
def test_a_secret_that_is_not_one_keeps_the_node_from_starting(
    make_cluster: MakeCluster, secret: Path, break_it: Callable[[Path], object], word: str
) -> None:
    """Longhorn's lesson: a missing secret is no reason to go on without."""
    cluster = make_cluster()
    secure(cluster, alpha=secret_line(secret), beta=secret_line(secret))
    cluster.create()
    break_it(secret)
    done = nbdmirror("serve", str(cluster.primary.config), timeout=60)
    assert done.code == 2 and word in done.err, done
    assert f"{cluster.primary.config}: replication.secret_file: {secret}" in done.err, done


def test_a_systemd_credential(
    make_cluster: MakeCluster, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``credential:NAME`` is looked for where LoadCredential puts it."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(secret.parent))
    cluster = make_cluster()
    line = f'secret_file = "credential:{secret.name}"'
    secure(cluster, alpha=line, beta=line)
    cluster.start()
    check_replicates(cluster)
