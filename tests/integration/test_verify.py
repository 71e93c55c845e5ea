"""Online verify: what rots is found, named and repaired, under load, and goes on where it was (X6).

What others are blamed for: differences that a client's writes explain, a verify that only marks,
that starts again from zero, that nobody can tell the end of (peers 26).
"""

from __future__ import annotations

from pathlib import Path

from tests.integration.cluster import MIB, Cluster, Json, Volume
from tests.integration.process import wait_until
from tests.integration.test_replication import STALL_S, MakeCluster
from tests.integration.tools import Writer, connect, pattern

REGION = 64 << 10


def rot(path: Path, *offsets: int) -> None:
    """Flips a bit at each offset, behind everybody's back."""
    with path.open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 0x40]))


def found(cluster: Cluster) -> list[tuple[str, int]]:
    """What the events name: what needed one look more was settled later."""
    events = cluster.primary.events()
    return sorted((e["volume"], e["offset"]) for e in events if e["kind"] == "verify-differs")


def test_nothing_differs_under_load(make_cluster: MakeCluster) -> None:
    """peers 26: a busy client makes no false alarm, and is not held up."""
    cluster = make_cluster().start()
    connect(cluster.primary.uri()).pwrite(pattern(32 * MIB, 1), 0)
    # As fast as it can it would write to some region whenever that is looked at.
    with Writer(cluster.primary.uri(), blocks=256, rate=MIB) as writer:
        result = cluster.primary.ok("verify", "beta", "--wait")
        assert "verified" in result.out
        wait_until("writes go on", lambda: writer.writes > 200)
    assert writer.slowest_s < STALL_S
    entry = cluster.primary.remote()["verify"]
    assert entry["differing"] == 0 and entry["unsettled"] == 0 and not entry["running"]
    assert entry["age_s"] < 60
    assert not found(cluster)
    cluster.check_in_sync()


def test_rot_is_found_named_and_repaired(make_cluster: MakeCluster) -> None:
    """peers 26: bit rot in a remote's facet: reported without --repair, exit 1; sent with it.

    Runbook: a copy rots."""
    cluster = make_cluster().start()
    connect(cluster.primary.uri()).pwrite(pattern(16 * MIB, 1), 0)
    cluster.check_in_sync()
    places = (3 * MIB + 5, 9 * MIB, 60 * MIB)
    rot(cluster.secondary.facets("data")[0], *places)
    with Writer(cluster.primary.uri(), offset=32 * MIB, rate=MIB / 4):
        result = cluster.primary.cli("verify", "beta", "--wait")
        assert result.code == 1 and "3 regions differ" in result.err
        assert "--repair" in result.err
        assert found(cluster) == [("data", at // REGION * REGION) for at in places]
        entry = cluster.primary.remote()
        assert entry["verify"]["differing"] == 3 and "3 regions that differ" in entry["why"]
        assert entry["next_action"] == "nbdmirror verify beta --repair"
        before = cluster.proxy.sent_bytes
        cluster.primary.ok("verify", "beta", "--repair", "--wait")
    cluster.check_in_sync()
    assert cluster.proxy.sent_bytes - before < 8 * MIB
    entry = cluster.primary.remote()
    assert entry["verify"]["repaired"] == 3 and entry["next_action"] is None
    cluster.primary.ok("verify", "beta", "--wait")
    assert cluster.primary.remote()["verify"]["differing"] == 0


def test_rot_in_one_of_two_local_facets(make_cluster: MakeCluster) -> None:
    """The remote tells which of two local facets is right; it is repaired from its equal here,
    whichever of them is read. Runbook: a copy rots."""
    cluster = make_cluster(volumes=[Volume(facets=2)]).start()
    connect(cluster.primary.uri()).pwrite(pattern(16 * MIB, 1), 0)
    cluster.check_in_sync()
    first, second = cluster.primary.facets("data")
    rot(first, 2 * MIB + 1)
    rot(second, 5 * MIB)
    before = cluster.proxy.sent_bytes
    cluster.primary.ok("verify", "beta", "--repair", "--wait")
    events = [e for e in cluster.primary.events() if e["kind"] == "verify-differs"]
    # What needed one look more was settled later.
    assert sorted((e["offset"], e["rotten"]) for e in events) == [
        (2 * MIB, [str(first)]),
        (5 * MIB, [str(second)]),
    ]
    assert cluster.proxy.sent_bytes - before < MIB
    cluster.check_in_sync()
    assert connect(cluster.primary.uri()).pread(16 * MIB, 0) == pattern(16 * MIB, 1)


def test_rot_in_one_of_a_secondarys_facets(make_cluster: MakeCluster) -> None:
    """Every facet is walked, there too: which one has rotted is found by what the primary has. What
    a verify found, and when, is known after a restart."""
    cluster = make_cluster(volumes=[Volume(facets=2)]).start()
    connect(cluster.primary.uri()).pwrite(pattern(16 * MIB, 1), 0)
    cluster.check_in_sync()
    first, second = cluster.secondary.facets("data")
    rot(first, 2 * MIB + 1)
    rot(second, 5 * MIB)
    assert cluster.primary.cli("verify", "beta", "--wait").code == 1
    assert found(cluster) == [("data", 2 * MIB), ("data", 5 * MIB)]
    cluster.primary.restart()
    told = cluster.primary.remote()["verify"]
    assert told["differing"] == 2 and 0 < told["age_s"] < 60, told
    cluster.primary.ok("verify", "beta", "--repair", "--wait")
    cluster.check_in_sync()


def test_it_goes_on_after_a_lost_link_and_a_restart(make_cluster: MakeCluster) -> None:
    """Resumable: the position is durable; at a stated rate."""
    keys: dict[str, str | int] = {"verify_rate": "4MiB"}
    cluster = make_cluster(volumes=[Volume(size=96 * MIB)], remote_keys=keys).start()

    def progress() -> Json | None:
        resync: Json | None = cluster.primary.remote()["resync"]
        return resync if resync and resync["kind"] == "verify" else None

    cluster.primary.ok("verify", "beta")
    wait_until(
        "12 s of it are done", lambda: (progress() or {"done_bytes": 0})["done_bytes"] > 48 * MIB
    )
    one = progress()
    assert one is not None and one["rate"] < 6 * MIB and one["eta_s"] > 5
    cluster.primary.stop()
    cluster.primary.start()
    later = wait_until("it goes on", progress)
    assert later["done_bytes"] >= 36 * MIB, "from where it was durable last"
    cluster.primary.ok("wait", "--until", "verified", "--remote", "beta", "--timeout", "60")
    assert cluster.primary.remote()["verify"]["differing"] == 0


def test_the_interval_of_the_configuration(make_cluster: MakeCluster) -> None:
    """A scheduled verify starts by itself, and repairs where that is the policy.

    Runbook: a copy rots."""
    keys: dict[str, str | int] = {"verify_interval": "1s", "verify_repair": True}
    cluster = make_cluster(remote_keys=keys).start()
    wait_until(
        "verified", lambda: (cluster.primary.remote()["verify"] or {}).get("age_s") is not None
    )
    rot(cluster.secondary.facets("data")[0], MIB)
    cluster.proxy.reset()  # a new session looks at once whether one is due
    cluster.primary.until("repaired", lambda one: (one["verify"] or {}).get("repaired") == 1, s=60)
    cluster.check_in_sync()
