"""Several local facets: out of service and back with only the difference (M1, M6, M8, M17)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.integration.cluster import MIB, Cluster, Volume, nbdmirror
from tests.integration.process import wait_until
from tests.integration.test_replication import STALL_S, MakeCluster
from tests.integration.tools import Writer, connect, pattern

SIZE = 64 * MIB
WAIT = ("--wait", "--timeout", "60")


def group(make_cluster: MakeCluster, facets: int = 2, **options: object) -> Cluster:
    return make_cluster(volumes=[Volume(size=SIZE, facets=facets)], **options).start()


def facet(cluster: Cluster, number: int) -> dict[str, Any]:
    """A facet's entry in the status, by its place in the configuration."""
    path = str(cluster.primary.facets("data")[number])
    (entry,) = [one for one in cluster.primary.rpc("facet.list") if one["path"] == path]
    found: dict[str, Any] = entry
    return found


@contextlib.contextmanager
def writing(cluster: Cluster, blocks: int = 4096) -> Iterator[None]:
    """A client that writes meanwhile, and neither fails nor waits for long."""
    with Writer(cluster.primary.uri(), blocks=blocks) as writer:
        yield
    assert writer.writes and writer.slowest_s < STALL_S


def test_offline_and_online_copies_only_the_difference(make_cluster: MakeCluster) -> None:
    """M8, peers 19: what changed meanwhile is in the log, and only that is copied, while a client
    writes."""
    cluster = group(make_cluster)
    node = cluster.primary
    path = node.facets("data")[1]
    handle = connect(node.uri())
    handle.pwrite(pattern(32 * MIB, 1), 0)
    node.ok("facet", "offline", str(path))
    assert facet(cluster, 1)["state"] == "not-synchronised"
    before = path.read_bytes()
    for number in range(10):
        handle.pwrite(pattern(4096, number), number * MIB)
    assert facet(cluster, 1)["queue"]["count"] == 10
    assert path.read_bytes() == before, "written to while offline"
    with writing(cluster, blocks=16):
        node.ok("facet", "online", str(path), *WAIT)
    returned = [one for one in node.events() if one["kind"] == "facet-synchronised"]
    assert returned and returned[-1]["copied_bytes"] <= 11 * 65536
    cluster.check_in_sync()


def test_a_secondary_makes_up_for_a_facet_that_is_gone(make_cluster: MakeCluster) -> None:
    """M12, I5: an empty file, or another one: what it lacks comes from the primary, by comparison.

    Runbook: or one of several facets."""
    cluster = group(make_cluster)
    handle = connect(cluster.primary.uri())
    handle.pwrite(pattern(8 * MIB, 1), 0)
    cluster.wait_in_sync()
    first, second = cluster.secondary.facets("data")
    for gone in (second, first):
        cluster.secondary.stop()
        gone.unlink()
        refused = nbdmirror("serve", str(cluster.secondary.config))
        assert refused.code == 1 and f"the facet {gone} is missing" in refused.err
        gone.write_bytes(b"\xff" * SIZE if gone == first else b"")
        cluster.secondary.start()
        handle.pwrite(pattern(MIB, 2), 4 * MIB)
        cluster.wait_in_sync()
        told = [one for one in cluster.secondary.events() if one["kind"] == "facets-rejoin"]
        assert [one["facets"] for one in told] == [[str(gone)]]
        cluster.check_in_sync()
        assert first.read_bytes() == second.read_bytes()


def test_a_new_facet_of_a_secondary_over_a_restart(make_cluster: MakeCluster) -> None:
    """M12, X1: what was compared with it is not compared again."""
    cluster = group(make_cluster, remote_keys={"max_rate": "16MiB"})
    handle = connect(cluster.primary.uri())
    handle.pwrite(pattern(SIZE, 1), 0)
    cluster.wait_in_sync()
    node, (_, gone) = cluster.secondary, cluster.secondary.facets("data")
    node.stop()
    gone.write_bytes(b"")
    node.start()

    def left(size: int) -> None:
        cluster.primary.until("some of it is there", lambda r: 0 < r["dirty"]["bytes"] < size)

    left(SIZE // 2)
    node.kill()
    node.start()
    cluster.primary.until("goes on", lambda r: r["link"] == "connected")
    left(SIZE // 2)
    cluster.wait_in_sync()
    assert "facets-rejoin" not in [one["kind"] for one in node.events()]
    cluster.check_in_sync()
    assert all(path.read_bytes() == pattern(SIZE, 1) for path in node.facets("data"))


def test_a_long_absence_is_kept_in_a_map(make_cluster: MakeCluster) -> None:
    """M8, O12: past the log the facet's own map takes over; remotes are not pushed out by it; the
    return goes on over a restart. Runbook: its disk must be replaced."""
    cluster = group(make_cluster, log_size=4 * MIB)
    node = cluster.primary
    path = node.facets("data")[0]
    handle = connect(node.uri())
    node.ok("facet", "offline", str(path))
    for number in range(24):
        handle.pwrite(pattern(MIB, number), number % 12 * MIB)
        node.until("keeps up", lambda one: one["lag"]["bytes"] < 2 * MIB)
    kinds = [one["kind"] for one in node.events()]
    assert "facet-overflow" in kinds and "overflow" not in kinds
    assert 0 < facet(cluster, 0)["dirty"]["bytes"] <= 12 * MIB
    handle.shutdown()
    node.restart()
    assert facet(cluster, 0)["offline"], "it came back by itself"
    with writing(cluster):
        node.ok("facet", "online", str(path), *WAIT)
    cluster.check_in_sync()
    node.kill()
    node.start()
    assert facet(cluster, 0)["state"] == "synchronised"
    cluster.check_in_sync()


def test_facets_are_added_and_removed_in_use(make_cluster: MakeCluster) -> None:
    """M17: a second facet is made while a client writes, the first is removed, and the node lives
    on with the second, over a restart too."""
    cluster = group(make_cluster, facets=1)
    node = cluster.primary
    (first,) = node.facets("data")
    second = first.with_name("second.img")
    connect(node.uri()).pwrite(pattern(8 * MIB, 3), 4 * MIB)
    with writing(cluster):
        node.ok("facet", "add", "data", str(second), *WAIT)
    node.ok("wait", "--until", "in-sync", "--timeout", "30")
    assert first.read_bytes() == second.read_bytes()
    assert second.stat().st_blocks * 512 < 40 * MIB, "holes were filled"
    node.ok("facet", "remove", str(first))
    assert first.exists()
    refused = node.cli("facet", "remove", str(second))
    assert refused.code == 4 and "last facet" in refused.err
    node.restart()
    handle = connect(node.uri())
    handle.pwrite(pattern(MIB, 4), 0)
    assert handle.pread(8 * MIB, 4 * MIB) == second.read_bytes()[4 * MIB : 12 * MIB]
    cluster.wait_in_sync()
    assert second.read_bytes() == cluster.secondary.facets("data")[0].read_bytes()


def test_a_replaced_disk_is_compared_whole(make_cluster: MakeCluster) -> None:
    """M15: a new disk, with other data on it, in the place of one that is out of service.

    Runbook: its disk must be replaced."""
    cluster = group(make_cluster)
    node = cluster.primary
    path = node.facets("data")[1]
    connect(node.uri()).pwrite(pattern(16 * MIB, 5), 0)
    refused = node.cli("facet", "replace", str(path))
    assert refused.code == 4 and "in service" in refused.err
    node.ok("facet", "offline", str(path))
    path.unlink()
    path.write_bytes(pattern(SIZE, 6))
    with writing(cluster):
        node.ok("facet", "replace", str(path), *WAIT)
    cluster.check_in_sync()
    new = path.with_name("new.img")
    node.ok("facet", "offline", str(path))
    done = node.ok("facet", "replace", str(path), str(new), *WAIT)
    assert done.out == f"{new}: synchronised\n"
    paths = [one["path"] for one in node.rpc("facet.list")]
    assert paths == [str(node.facets("data")[0]), str(new)]
    cluster.wait_in_sync()
    assert new.read_bytes() == node.facets("data")[0].read_bytes()


def test_a_facet_that_is_missing_at_start(make_cluster: MakeCluster) -> None:
    """M15: the node starts without it, says so, and takes back what then comes in its place.

    Runbook: a facet is missing when the node starts."""
    cluster = group(make_cluster)
    node = cluster.primary
    path = node.facets("data")[0]
    connect(node.uri()).pwrite(pattern(8 * MIB, 7), 0)
    node.stop()
    aside = path.with_name("aside")
    path.rename(aside)
    node.start()
    assert facet(cluster, 0)["state"] == "not-synchronised"
    assert "missing" in facet(cluster, 0)["why"]
    handle = connect(node.uri())
    handle.pwrite(pattern(MIB, 8), MIB)
    assert handle.pread(MIB, MIB) == pattern(MIB, 8)
    aside.rename(path)
    node.ok("facet", "online", str(path), *WAIT)
    cluster.check_in_sync()


def test_a_return_goes_on_after_a_kill(make_cluster: MakeCluster) -> None:
    """M6, O19: killed in the middle of a copy, the facet is not trusted, and the copy goes on."""
    cluster = group(make_cluster, log_size=4 * MIB)
    node = cluster.primary
    path = node.facets("data")[1]
    node.ok("facet", "offline", str(path))
    handle = connect(node.uri())
    for number in range(SIZE // MIB):
        handle.pwrite(pattern(MIB, number), number * MIB)
    node.rpc("facet.online", path=str(path))
    node.kill()
    node.start()
    wait_until("the facet is back", lambda: facet(cluster, 1)["state"] == "synchronised")
    cluster.check_in_sync()


def test_commands_name_what_is_wrong(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = group(make_cluster)
    node = cluster.primary
    first = str(node.facets("data")[0])
    for args, code, words in (
        (("offline", "/nowhere"), 2, "no facet"),
        (("add", "nothing", str(tmp_path / "x")), 2, "no volume"),
        (("add", "data", first), 2, "a facet already"),
        (("add", "data", str(tmp_path / "no" / "x")), 1, "cannot make"),
    ):
        result = node.cli("facet", *args)
        assert result.code == code and words in result.err, result
    small = tmp_path / "small"
    small.write_bytes(bytes(4096))
    result = node.cli("facet", "add", "data", str(small))
    assert result.code == 1 and "4096 bytes" in result.err, result
    assert len(node.rpc("facet.list")) == 2
    text = node.ok("facet", "list").out
    assert f"data: {first}: synchronised" in text
    secondary = cluster.secondary
    result = secondary.cli("facet", "offline", str(secondary.facets("data")[0]))
    assert result.code == 4 and "secondary" in result.err


def test_a_secondary_lists_what_its_status_has(make_cluster: MakeCluster) -> None:
    """M6: to look is not refused anywhere; a secondary has facets, and no remotes."""
    cluster = group(make_cluster)
    cluster.check_in_sync()
    node = cluster.secondary
    (volume,) = node.status()["volumes"]
    listed = node.ok("facet", "list", "--json").json
    assert listed == [{"volume": "data", **facet} for facet in volume["facets"]]
    lines = node.ok("facet", "list").out.splitlines()
    assert lines == [f"data: {path}: synchronised" for path in node.facets("data")]
    assert node.ok("remote", "list", "--json").json == []
    assert node.ok("remote", "list").out == "no remotes\n"
