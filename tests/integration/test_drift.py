"""What people change between a stop and a start: never silently wrong, never a guess (I5, I9)."""

from __future__ import annotations

from collections.abc import Callable

from tests.integration.cluster import MIB, Cluster, Volume
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
    for number, volume in enumerate(cluster.volumes):
        handle = connect(cluster.primary.uri(volume.name))
        assert handle.pread(MIB, MIB) == pattern(MIB, number), volume.name
        handle.shutdown()
    cluster.check_in_sync()


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
    assert {"data.img", "notes", "0" * 32, "alpha", "beta"} <= {
        one.name for one in shared.iterdir()
    }
