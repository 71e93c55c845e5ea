"""What people change between a stop and a start: never silently wrong, never a guess (I5, I9)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.integration.cluster import MIB, Cluster, Node, Volume, nbdmirror
from tests.integration.process import wait_until
from tests.integration.tools import connect, pattern

MakeCluster = Callable[..., Cluster]
SIZE = 4 * MIB
VOLUMES = [Volume("a", SIZE), Volume("b", SIZE)]


def started(make_cluster: MakeCluster, **options: object) -> Cluster:
    """A small group in sync, each volume with content of its own."""
    cluster = make_cluster(**{"volumes": VOLUMES, "log_size": 4 * MIB, **options}).start()
    for number, volume in enumerate(cluster.volumes):
        handle = connect(cluster.primary.uri(volume.name))
        handle.pwrite(pattern(MIB, number), MIB)
        handle.flush()
        handle.shutdown()
    cluster.wait_in_sync()
    return cluster


def check_content(cluster: Cluster) -> None:
    """What was written is read, and everybody holds it."""
    check_reads(cluster)
    cluster.check_in_sync()


def check_reads(cluster: Cluster) -> None:
    """What was written is read."""
    for number, volume in enumerate(cluster.volumes):
        handle = connect(cluster.primary.uri(volume.name))
        assert handle.pread(MIB, MIB) == pattern(MIB, number), volume.name
        handle.shutdown()


def refused(node: Node, *words: object) -> None:
    """It does not start, and says these words."""
    result = nbdmirror("serve", str(node.config), timeout=30)
    assert result.code == 1, result
    for word in words:
        assert str(word) in result.err, result


def another_file(path: Path) -> None:
    """As large, and empty: what lies there where a disk is not mounted, or a new one."""
    path.rename(path.with_suffix(".former"))
    with path.open("wb") as file:
        file.truncate(SIZE)


def exchange(one: Path, other: Path) -> None:
    """Each lies where the other was."""
    third = one.rename(one.with_suffix(".third"))
    other.rename(one)
    third.rename(other)


def test_the_files_of_two_volumes_are_exchanged(make_cluster: MakeCluster) -> None:
    """I5, fault 29: as when disks change names with a boot. Nothing is lost, so nothing is written
    over: the node does not start, and with each back in its place nothing is sent again.

    Runbook: two disks have exchanged their names."""
    cluster = started(make_cluster)
    node = cluster.primary
    node.kill()
    (first,), (second,) = node.facets("a"), node.facets("b")
    exchange(first, second)
    refused(node, f"what lies at {first} is the facet that was at {second}", "/dev/disk/by-id")
    exchange(first, second)
    before = cluster.proxy.sent_bytes
    node.start()
    check_content(cluster)
    assert cluster.proxy.sent_bytes - before < MIB


def test_another_file_where_a_remote_has_the_volume(make_cluster: MakeCluster) -> None:
    """I5, M11: of volumes without another facet the remote has what was written; what lies there is
    compared with it, and mended.

    Runbook: another file lies where a volume's only facet was."""
    cluster = started(make_cluster)
    node = cluster.primary
    node.kill()
    paths = [*node.facets("a"), *node.facets("b")]
    for path in paths:
        another_file(path)
    node.start()
    check_reads(cluster)
    for path in paths:
        node.ok("facet", "online", str(path), "--wait", "--timeout", "30")
    told = {one["facet"] for one in node.events() if one["kind"] == "facet-returns"}
    assert told == {*map(str, paths)}
    cluster.compare()


def test_another_file_where_nobody_else_has_the_volume(make_cluster: MakeCluster) -> None:
    """I5: an empty file is not served, nor sent to a remote that has more: the node does not start,
    and says why. With the former one back nothing is sent again."""
    cluster = started(make_cluster)
    cluster.proxy.refuse()
    handle = connect(cluster.primary.uri("a"))
    for number in range(8):
        handle.pwrite(pattern(MIB, number), number % 4 * MIB)
    cluster.primary.until("is tracked", lambda one: one["state"] == "tracking")
    handle.pwrite(pattern(MIB, 0), MIB)
    handle.shutdown()
    cluster.primary.stop()
    (path,) = cluster.primary.facets("a")
    another_file(path)
    refused(cluster.primary, "another file lies at", path, "create CONFIG --role primary --force")
    path.with_suffix(".former").rename(path)
    cluster.primary.start()
    cluster.proxy.heal()
    check_content(cluster)


def test_another_file_on_a_secondary(make_cluster: MakeCluster) -> None:
    """I5, X1: it would be taken for what the primary sent; created anew it is compared.

    Runbook: another file lies where a volume's only facet was."""
    cluster = started(make_cluster)
    node = cluster.secondary
    node.stop()
    another_file(node.facets("a")[0])
    refused(node, "another file lies at", "create CONFIG --role secondary --force")
    before = cluster.proxy.sent_bytes
    node.create("--force")
    node.start()
    check_content(cluster)
    assert cluster.proxy.sent_bytes - before < 2 * MIB, "what was there was sent again"


def test_snapshots_in_a_directory_with_other_files(make_cluster: MakeCluster) -> None:
    """O18, I9: two nodes keep their snapshots in one directory, that of their facets; what a start
    or ``create --force`` removes there is its own: no facet, and no snapshot of another node."""
    cluster = make_cluster(volumes=VOLUMES, log_size=4 * MIB)
    shared = cluster.directory
    (shared / f"{'0' * 32}").write_text("a person's")
    for node in cluster.nodes:
        node.write_config(f'[snapshots]\npath = "{shared}"\n')
    for name in ("data.img", "notes"):
        (shared / name).write_text(name)
    cluster = started(lambda **_: cluster)
    cluster.primary.ok("snapshot", "create")
    cluster.wait_in_sync()
    for node in cluster.nodes:
        node.restart()
        assert [one["state"] for one in node.status()["snapshots"]] == ["ok"], node.name
    check_content(cluster)
    cluster.secondary.stop()
    assert cluster.secondary.create("--force").code == 0
    assert len(list((shared / "db" / "alpha").iterdir())) == len(VOLUMES)
    assert not list((shared / "db" / "beta").iterdir())
    cluster.primary.stop()
    cluster.primary.write_config('[snapshots]\npath = "../elsewhere"\n')
    refused(cluster.primary, "the snapshots are in", shared / "db" / "alpha", "elsewhere")
    (shared / "elsewhere" / "db").mkdir(parents=True)
    (shared / "db" / "alpha").rename(shared / "elsewhere" / "db" / "alpha")
    cluster.primary.start()
    assert [one["state"] for one in cluster.primary.status()["snapshots"]] == ["ok"]
    assert {"data.img", "notes", "0" * 32, "alpha", "beta"} <= {
        one.name for one in shared.iterdir()
    }


def edit(node: Node, *changes: tuple[object, object]) -> None:
    """Each text in the configuration becomes another one."""
    text = node.config.read_text()
    for old, new in changes:
        assert str(old) in text
        text = text.replace(str(old), str(new))
    node.config.write_text(text)


def test_paths_that_change_in_the_configuration(make_cluster: MakeCluster) -> None:
    """I5, I9: a node goes on with its own files: those that were moved, and in a copy of all of it
    the copies. Other paths are refused, by SIGHUP with the word that a start would have, and what a
    command was refused is as before."""
    cluster = started(make_cluster, remotes=())
    node = cluster.primary
    (first,), (second,) = node.facets("a"), node.facets("b")
    short, taken = node.directory / "short", node.directory / "taken"
    short.write_bytes(b"short")
    taken.write_bytes(b"somebody's")
    for _ in range(2):
        assert node.cli("facet", "add", "a", str(short)).code == 1
    assert not list((node.directory / "state" / "dcm").iterdir()), "a map is left"
    good = node.config.read_text()
    edit(node, (first, "@"), (second, first), ("@", second))
    node.reload()
    (told,) = wait_until("reloaded", lambda: [e for e in node.events() if e["kind"] == "reloaded"])
    assert "the facets of volume a are" in told["refused"]
    node.stop()
    refused(node, "the facets of volume a are", first, second)
    node.config.write_text(good)
    edit(node, ('mode = "disk"', f'mode = "disk"\npath = "{taken}"'))
    refused(node, "the log is", taken, "log replace")
    again = node.create("--force")
    assert again.code == 1 and "is no log" in again.err, again
    assert taken.read_bytes() == b"somebody's"
    node.config.write_text(good)
    second.rename(node.directory / "former.img")
    second.hardlink_to(first)
    checked = nbdmirror("check", str(node.config))
    assert checked.code == 2 and "are the same file" in checked.err, checked
    refused(node, f"the facet {second} is in use", "give each facet a file of its own")
    (node.directory / "former.img").replace(second)
    moved = first.rename(node.directory / "moved.img")
    edit(node, (first, moved), ("size = 4194304\nmode", "size = 8388608\nmode"))
    node.start()
    check_reads(cluster)
    (kept,) = [one for one in node.events() if one["kind"] == "log-size-kept"]
    assert (kept["size"], kept["configured"]) == (4 * MIB, 8 * MIB)
    node.ok("log", "replace", str(node.directory / "state" / "larger.log"))
    assert node.status()["log"]["size"] == 8 * MIB - 4096
    node.stop()
    former = node.directory.rename(node.directory.with_name("former"))
    shutil.copytree(former, node.directory)
    shutil.copytree(former, cluster.directory / "third")
    edit(node, (node.directory, cluster.directory / "third"))
    node.start()
    check_reads(cluster)
    files = [os.path.realpath(one) for one in Path(f"/proc/{node.daemon.pid}/fd").iterdir()]
    third = cluster.directory / "third"
    assert {f"{third}/moved.img", f"{third}/b.0.img", f"{third}/state/larger.log"} <= {*files}
    assert not [one for one in files if one.startswith(f"{node.directory}/state")]


def test_one_node_is_one_remote(make_cluster: MakeCluster) -> None:
    """T1, M17: under a second name, by the same address or another, or where a third node was met:
    refused, and the link that is there stays. What was removed by a command stays so."""
    cluster = started(make_cluster, volumes=VOLUMES[:1], remotes=("beta", "gamma"))
    node, beta = cluster.primary, cluster.secondary
    address = cluster.remote_address(beta)
    twice = node.cli("remote", "add", "delta", address)
    assert twice.code == 2 and "the address of remote beta already" in twice.err
    itself = node.cli("remote", "add", "alpha", "tcp:127.0.0.1:1")
    assert itself.code == 2 and "this node itself" in itself.err
    node.ok("remote", "add", "delta", f"tcp:127.0.0.1:{beta.replication_port}")
    found = node.until("is refused", lambda one: one["state"] == "refused", remote="delta")
    assert "is beta, and that is remote beta of alpha" in found["why"]
    assert not [one for one in node.events() if one["kind"] == "disconnected"]
    for name in ("delta", "beta"):
        node.ok("remote", "remove", name)
    edit(node, (cluster.remote_address(cluster.secondaries[1]), "@"))
    edit(node, (address, cluster.remote_address(cluster.secondaries[1])), ("@", address))
    node.restart()
    told = node.until("is refused", lambda one: one["state"] == "refused", remote="gamma")
    assert "remote gamma is node gamma, and beta is at" in told["why"]
    edit(node, (cluster.remote_address(cluster.secondaries[1]), "@"))
    edit(node, (address, cluster.remote_address(cluster.secondaries[1])), ("@", address))
    node.restart()
    node.until("is back", lambda one: one["state"] == "synchronised", remote="gamma")
    assert [one["name"] for one in node.status()["remotes"]] == ["beta", "gamma"]
    node.ok("remote", "remove", "beta")
    node.restart()
    assert [one["name"] for one in node.status()["remotes"]] == ["gamma"]
    node.ok("remote", "add", "beta", address)
    check_content(cluster)


def test_names_with_dots_have_maps_of_their_own(make_cluster: MakeCluster) -> None:
    """V1, M17: remote ``a`` with volume ``b.c`` is not remote ``a.b`` with volume ``c``; and
    ``dump`` finds what a start finds."""
    volumes = [Volume("c", SIZE), Volume("b.c", SIZE)]
    cluster = started(make_cluster, volumes=volumes, remotes=("a", "a.b"))
    node = cluster.primary
    assert len(list((node.directory / "state" / "dcm").iterdir())) == 4
    node.stop()
    dumped = nbdmirror("dump", "dcm", str(node.config), "--json")
    assert dumped.code == 0, dumped
    node.start()
    check_content(cluster)
