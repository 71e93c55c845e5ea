"""Snapshots with real daemons and clients: V9-V13, X2."""

from __future__ import annotations

from collections.abc import Callable

from tests.integration.cluster import MIB, Cluster, Json, Node, Volume
from tests.integration.process import wait_until
from tests.integration.tools import Writer, connect, pattern

KIB = 1 << 10
MakeCluster = Callable[..., Cluster]


def snapshot_uri(node: Node, name: str) -> str:
    """Where a client attaches a snapshot."""
    return node.uri(name)


def wait_status(node: Node, what: str, condition: Callable[[Json], object]) -> None:
    """Waits until the node's status satisfies ``condition``."""
    wait_until(f"{node.name}: {what}", lambda: condition(node.status()) or None, 30.0)


def taken(node: Node) -> list[Json]:
    """The snapshots that a node has, oldest first."""
    return [s for s in node.ok("snapshot", "list", "--json").json if s["state"] == "ok"]


def test_a_snapshot_is_the_same_on_both_sides_while_writing_goes_on(
    make_cluster: MakeCluster,
) -> None:
    """V9: same uuid, same record, same content; the secondary's can be attached meanwhile."""
    cluster = make_cluster().start()
    primary, secondary = cluster.primary, cluster.secondary
    handle = connect(primary.uri())
    handle.pwrite(pattern(4 * MIB, 1), 0)
    with Writer(primary.uri(), offset=16 * MIB):
        made = primary.ok("snapshot", "create", "--json").json
        handle.pwrite(pattern(4 * MIB, 2), 2 * MIB)
        wait_status(
            secondary, "has it", lambda status: any(s["state"] == "ok" for s in status["snapshots"])
        )
        (other,) = taken(secondary)
        assert (other["uuid"], other["seq"]) == (made["uuid"], made["seq"])
        images = []
        for node in (primary, secondary):
            reader = connect(snapshot_uri(node, "data@1"))
            assert reader.is_read_only()
            images.append([bytes(reader.pread(MIB, at)) for at in range(0, 8 * MIB, MIB)])
        assert images[0] == images[1]
        assert b"".join(images[0][:4]) == pattern(4 * MIB, 1)
    ranges = primary.ok("snapshot", "diff", "1", "--json").json["ranges"]
    assert {"volume": "data", "offset": 2 * MIB, "length": 4 * MIB} in ranges
    cluster.check_in_sync()


def test_a_restore_is_there_at_once_and_the_secondary_follows(make_cluster: MakeCluster) -> None:
    """V11, V12: without stopping replication; only the changed regions travel; reversible."""
    cluster = make_cluster().start()
    primary = cluster.primary
    handle = connect(primary.uri())
    handle.pwrite(pattern(8 * MIB, 1), 0)
    handle.flush()
    cluster.wait_in_sync()
    primary.ok("snapshot", "create", "data")
    handle.pwrite(pattern(2 * MIB, 2), 3 * MIB)
    handle.pwrite(pattern(MIB, 3), 20 * MIB)
    cluster.wait_in_sync()
    refused = primary.cli("restore", "1")
    assert refused.code == 4 and "--while-attached" in str(refused)
    sent = primary.remote()["bytes_sent"]
    done = primary.ok("restore", "1", "--while-attached", "--json").json
    assert bytes(handle.pread(8 * MIB, 0)) == pattern(8 * MIB, 1)
    assert bytes(handle.pread(MIB, 20 * MIB)) == bytes(MIB)
    handle.pwrite(pattern(4 * KIB, 4), 4 * MIB)
    handle.flush()
    wait_status(primary, "is copied", lambda status: status["restore"] is None)
    cluster.check_in_sync()
    assert primary.remote()["bytes_sent"] - sent < 3 * MIB + MIB
    primary.ok("restore", done["undo"][:8], "--while-attached", "--no-keep")
    assert bytes(handle.pread(2 * MIB, 3 * MIB)) == pattern(2 * MIB, 2)
    wait_status(primary, "is copied", lambda status: status["restore"] is None)
    cluster.check_in_sync()


def test_the_last_consistent_image_is_there_during_a_resync(make_cluster: MakeCluster) -> None:
    """X2: a snapshot of its own on the secondary until it is consistent again."""
    cluster = make_cluster(log_size=4 * MIB).start()
    primary, secondary = cluster.primary, cluster.secondary
    handle = connect(primary.uri())
    handle.pwrite(pattern(8 * MIB, 1), 0)
    handle.flush()
    cluster.wait_in_sync()
    cluster.proxy.refuse()
    for at in range(0, 32 * MIB, MIB):
        handle.pwrite(pattern(MIB, 2), at)
    primary.until("tracks", lambda entry: entry["state"] == "tracking")
    cluster.proxy.heal()
    cluster.proxy.shape(rate=4 * MIB)
    wait_status(
        secondary,
        "keeps its image",
        lambda status: any(s["kind"] == "resync" for s in status["snapshots"]),
    )
    (image,) = [s for s in taken(secondary) if s["kind"] == "resync"]
    reader = connect(snapshot_uri(secondary, f"data@{image['uuid'][:8]}"))
    assert bytes(reader.pread(8 * MIB, 0)) == pattern(8 * MIB, 1)
    reader.shutdown()
    cluster.proxy.shape()
    cluster.check_in_sync()
    wait_status(secondary, "lets go", lambda status: not status["snapshots"])


def test_a_secondary_in_dcm_logging_says_which_it_lacks(make_cluster: MakeCluster) -> None:
    """V9: no record of these snapshots reached it. It takes the next one, and what was deleted
    everywhere meanwhile goes there too."""
    cluster = make_cluster(log_size=4 * MIB).start()
    primary, secondary = cluster.primary, cluster.secondary
    handle = connect(primary.uri())
    primary.ok("snapshot", "create")
    wait_status(secondary, "has it", lambda status: status["snapshots"])
    cluster.proxy.refuse()
    for at in range(0, 16 * MIB, MIB):
        handle.pwrite(pattern(MIB, 2), at)
    primary.until("tracks", lambda entry: entry["state"] == "tracking")
    missed = primary.ok("snapshot", "create", "--json").json
    primary.ok("snapshot", "delete", "1", "--everywhere")
    cluster.proxy.heal()
    cluster.check_in_sync()
    wait_status(
        secondary,
        "follows the deletion",
        lambda status: [(s["number"], s["state"]) for s in status["snapshots"]] == [(2, "lost")],
    )
    (lacking,) = secondary.ok("snapshot", "list", "--json").json
    assert (lacking["uuid"], lacking["seq"]) == (missed["uuid"], missed["seq"])
    assert "got no records" in lacking["why"]
    made = primary.ok("snapshot", "create", "--json").json
    wait_status(
        secondary,
        "takes the next",
        lambda status: any(s["uuid"] == made["uuid"] for s in status["snapshots"]),
    )
    assert [s["uuid"] for s in taken(secondary)] == [made["uuid"]]


def test_what_changed_a_facet_by_itself_is_taken_in(make_cluster: MakeCluster) -> None:
    """V13."""
    cluster = make_cluster().start()
    primary = cluster.primary
    handle = connect(primary.uri())
    handle.pwrite(pattern(MIB, 1), 0)
    handle.flush()
    cluster.wait_in_sync()
    with primary.facets("data")[0].open("r+b") as file:
        file.seek(512 * KIB)
        file.write(pattern(64 * KIB, 2))
    primary.ok("changed", "data", f"{512 * KIB}+{64 * KIB}")
    cluster.check_in_sync()
    with cluster.secondary.facets("data")[0].open("rb") as file:
        file.seek(512 * KIB)
        assert file.read(64 * KIB) == pattern(64 * KIB, 2)


def test_another_facets_content_does_not_undo_what_was_changed(make_cluster: MakeCluster) -> None:
    """V13: the facet that was written to is what the others follow, or nothing is."""
    cluster = make_cluster(volumes=[Volume(facets=2)]).start()
    primary = cluster.primary
    connect(primary.uri()).pwrite(pattern(MIB, 1), 0)
    cluster.wait_in_sync()
    first, second = primary.facets("data")
    with second.open("r+b") as file:
        file.write(pattern(64 * KIB, 2))
    done = primary.ok("changed", "data", f"0+{64 * KIB}", "--facet", str(second), "--json").json
    assert done["facet"] == str(second)
    cluster.check_in_sync()
    assert first.read_bytes()[: 64 * KIB] == pattern(64 * KIB, 2)
    primary.ok("facet", "offline", str(first))
    refused = primary.cli("changed", "data", f"0+{64 * KIB}")
    assert refused.code != 0 and f"facet {first} is not in service" in refused.err


def test_a_secondary_is_restored_only_while_its_link_is_inactive(make_cluster: MakeCluster) -> None:
    """V14, peers 24: and what was restored there is compared, not believed, when the primary is
    back."""
    cluster = make_cluster().start()
    primary, secondary = cluster.primary, cluster.secondary
    handle = connect(primary.uri())
    handle.pwrite(pattern(2 * MIB, 1), 0)
    primary.ok("snapshot", "create")
    handle.pwrite(pattern(2 * MIB, 2), MIB)
    handle.flush()
    cluster.wait_in_sync()
    wait_status(secondary, "has it", lambda status: status["snapshots"])
    refused = secondary.cli("restore", "1")
    assert refused.code == 4 and "pause this remote" in str(refused)
    primary.ok("pause", "beta")
    wait_status(secondary, "is alone", lambda s: s["upstream"]["link"] == "disconnected")
    secondary.ok("apply", "freeze")
    refused = secondary.cli("restore", "1")
    assert refused.code == 4 and "beta is frozen" in refused.err  # that point would be gone (V8)
    secondary.ok("apply", "thaw")
    done = secondary.ok("restore", "1", "--json").json
    wait_status(secondary, "is copied", lambda status: status["restore"] is None)
    reader = connect(snapshot_uri(secondary, f"data@{done['undo'][:8]}"))
    assert bytes(reader.pread(2 * MIB, MIB)) == pattern(2 * MIB, 2)  # the state before
    reader.shutdown()
    secondary.restart()
    with secondary.facets("data")[0].open("rb") as file:
        assert file.read(2 * MIB) == pattern(2 * MIB, 1)
    primary.ok("resume", "beta")
    cluster.check_in_sync()


def test_a_restore_where_changes_are_not_tracked_is_refused_or_compared(
    make_cluster: MakeCluster,
) -> None:
    """V14: on_full = "block" never gives up order by itself; forced, everything is compared, and
    what is the same does not travel."""
    cluster = make_cluster(on_full="block").start()
    primary = cluster.primary
    handle = connect(primary.uri())
    handle.pwrite(pattern(8 * MIB, 1), 0)
    primary.ok("snapshot", "create")
    handle.pwrite(pattern(MIB, 2), 2 * MIB)
    handle.flush()
    handle.shutdown()
    cluster.wait_in_sync()
    refused = primary.cli("restore", "1")
    assert refused.code == 4 and "--force" in str(refused) and "not tracked" in str(refused)
    status = primary.status()
    assert status["restore"] is None and len(status["snapshots"]) == 1, "something is left of it"
    cluster.check_in_sync()
    sent = primary.remote()["bytes_sent"]
    primary.ok("restore", "1", "--force")
    reader = connect(primary.uri())
    assert bytes(reader.pread(8 * MIB, 0)) == pattern(8 * MIB, 1)
    wait_status(primary, "is copied", lambda status: status["restore"] is None)
    cluster.check_in_sync()
    assert primary.remote()["bytes_sent"] - sent < 4 * MIB
    kinds = [(e["kind"], e.get("action")) for e in primary.ok("events", "--no-follow").lines]
    assert ("handshake", "full") in kinds[-20:] or ("handshake", "reset") in kinds[-20:]
