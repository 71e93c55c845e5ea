"""State that is old, foreign, missing or rotten (faults 15, 28, 29, 31, 32; T1, T2, T6, X1, X6).

Never silently wrong (I5): a node refuses, naming the file, or says so and compares by hash.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdmirror.codec import mappage, record, slots
from tests.faults.inject import (
    check_equal,
    check_message,
    check_serves,
    reboot,
    resyncs,
    serve_fails,
)
from tests.faults.journal import Journal, Load
from tests.integration.cluster import MIB, Cluster, Node, Volume, nbdmirror
from tests.integration.process import wait_until
from tests.integration.test_replication import SESSION_OVERHEAD
from tests.integration.tools import connect

MakeCluster = Callable[..., Cluster]
SIZE = 8 * MIB
LOG_AT = 4096


def small_group(make_cluster: MakeCluster, **options: object) -> Cluster:
    """A primary and a secondary of one small volume."""
    return make_cluster(volumes=[Volume(size=SIZE)], log_size=16 * MIB, **options).start()


def write(cluster: Cluster, journal: Journal, batches: int = 30, seed: int = 1) -> None:
    """A load, made durable by a FLUSH at its end."""
    with Load(cluster.primary.nbd_socket, journal, seed=seed) as load:
        load.run(batches)
        load.flush()


def state_of(node: Node) -> Path:
    """Its state directory."""
    return node.directory / "state"


def backup(node: Node, to: Path) -> None:
    """A copy of a stopped node: its state and its facets."""
    subdirectory = to / node.name
    shutil.copytree(node.directory, subdirectory)


def restore(node: Node, from_: Path) -> None:
    """The copy back in place."""
    shutil.rmtree(node.directory)
    shutil.copytree(from_ / node.name, node.directory)


def refused(cluster: Cluster, rule: str) -> str:
    """The remote is refused by this rule, visibly and with a next action; returns why."""
    entry = cluster.primary.until("is refused", lambda one: one["state"] == "refused")
    assert rule in entry["why"] and entry["next_action"], entry
    why: str = entry["why"]
    return why


# -- old -------------------------------------------------------------------------------------------


def test_primary_from_a_backup(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """Fault 28, T6: the primary lost history that the secondary has: refused and visible; not a
    byte of the secondary changes. Runbook: an old copy of a node comes back."""
    cluster = small_group(make_cluster)
    journal = Journal(SIZE)
    write(cluster, journal)
    cluster.primary.stop()
    backup(cluster.primary, tmp_path)
    cluster.primary.start()
    write(cluster, journal, seed=2)
    check_equal(cluster)
    cluster.primary.stop()
    before = cluster.secondary.facets("data")[0].read_bytes()
    restore(cluster.primary, tmp_path)
    cluster.primary.start()
    refused(cluster, "T6")
    assert cluster.secondary.facets("data")[0].read_bytes() == before


def test_primary_from_a_backup_that_went_on(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """Fault 28: as before, but before they meet again the restored primary has taken more writes
    than it lost: its seqs are those of other records. Refused or compared, never just continued."""
    cluster = small_group(make_cluster)
    journal = Journal(SIZE)
    write(cluster, journal)
    cluster.primary.stop()
    backup(cluster.primary, tmp_path)
    cluster.primary.start()
    write(cluster, journal, seed=2)
    check_equal(cluster)
    cluster.primary.stop()
    restore(cluster.primary, tmp_path)
    cluster.proxy.refuse()
    cluster.primary.start()
    write(cluster, Journal(SIZE), batches=90, seed=3)
    cluster.proxy.heal()
    entry = cluster.primary.until(
        "has made up its mind", lambda one: one["state"] in ("refused", "synchronised")
    )
    if entry["state"] == "synchronised":
        check_equal(cluster)


@pytest.mark.parametrize("copied", [False, True], ids=["in place", "elsewhere"])
def test_primary_that_is_set_back_to_when_it_ran(make_cluster: MakeCluster, copied: bool) -> None:
    """Fault 28, T6: in one boot it seems that only the process had died, and more is written than
    was lost before the two meet. T7: other files tell of a copy, so all is compared."""
    cluster = make_cluster(volumes=[Volume(size=SIZE)], log_size=16 * MIB)
    node = cluster.primary
    node.keys["log"] = ['extent_size = "64KiB"']
    node.write_config()
    cluster.start()
    write(cluster, Journal(MIB))
    check_equal(cluster)
    kept = {path: path.read_bytes() for path in node.directory.rglob("*") if path.is_file()}
    connect(node.uri()).pwrite(bytes(range(256)) * 16, SIZE - MIB)
    check_equal(cluster)
    node.kill()
    for path, data in kept.items():
        (new := path.with_name("new") if copied else path).write_bytes(data)
        new.rename(path)
    if copied:
        reboot(node)
    cluster.proxy.refuse()
    node.start()
    write(cluster, Journal(MIB), seed=3)
    cluster.proxy.heal()
    check_equal(cluster) if copied else refused(cluster, "T6")


def test_secondary_from_a_backup(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """Fault 28, T5: the secondary lost what it had confirmed and the log has let go: compared by
    hash, with the reason; then equal. Runbook: an old copy of a node comes back."""
    cluster = make_cluster(volumes=[Volume(size=SIZE)], log_size=4 * MIB).start()
    journal = Journal(SIZE)
    write(cluster, journal)
    check_equal(cluster)
    cluster.secondary.stop()
    backup(cluster.secondary, tmp_path)
    cluster.secondary.start()
    for seed in range(2, 8):
        write(cluster, journal, seed=seed, batches=60)
        check_equal(cluster)
    cluster.secondary.stop()
    restore(cluster.secondary, tmp_path)
    cluster.secondary.start()
    check_equal(cluster)
    assert resyncs(cluster)[-1]["rule"] == "T5", resyncs(cluster)
    check_serves(cluster, journal)


# -- foreign ---------------------------------------------------------------------------------------


def test_foreign_secondary(make_cluster: MakeCluster) -> None:
    """Fault 29, T1: an address leads to a node of another group that has the same names: refused,
    and nothing of it changes. Runbook: wrong peer, another primary, other group, other size."""
    ours, theirs = small_group(make_cluster), small_group(make_cluster)
    write(ours, Journal(SIZE), seed=1)
    write(theirs, Journal(SIZE), seed=2)
    check_equal(ours)
    check_equal(theirs)
    for cluster in (ours, theirs):
        cluster.primary.stop()
    before = theirs.secondary.facets("data")[0].read_bytes()
    text = ours.primary.config.read_text()
    ours.primary.config.write_text(text.replace(ours.proxy.address, theirs.proxy.address))
    ours.primary.start()
    assert "uuid" in refused(ours, "T1")
    assert theirs.secondary.facets("data")[0].read_bytes() == before


def test_foreign_state_directory(make_cluster: MakeCluster) -> None:
    """Fault 29: the state directory of another node: refused before anything is opened for
    writing, with both names."""
    cluster = small_group(make_cluster)
    for node in reversed(cluster.nodes):
        node.stop()
    alpha, beta = cluster.primary, cluster.secondary
    state_of(alpha).rename(cluster.directory / "kept")
    shutil.copytree(state_of(beta), state_of(alpha))
    message = serve_fails(alpha)
    assert "beta" in message and "alpha" in message
    shutil.rmtree(state_of(alpha))
    (cluster.directory / "kept").rename(state_of(alpha))
    for node in cluster.nodes:
        node.start()
    check_equal(cluster)


# -- missing ---------------------------------------------------------------------------------------


def test_missing_file(make_cluster: MakeCluster) -> None:
    """Faults 31 and 32: something of a node is gone: exit 1 and its name; nothing is made anew
    by itself; back in place, all goes on."""
    cluster = small_group(make_cluster)
    journal = Journal(SIZE)
    write(cluster, journal)
    node = cluster.primary
    node.kill()
    state = state_of(node)
    aside = cluster.directory / "aside"
    # A facet may be missing where a remote follows: see test_no_facet.
    for path in (state, state / "superblock", state / "log", state / "active"):
        path.rename(aside)
        # A directory without a superblock holds no state.
        named = state if path.name == "superblock" else path
        assert str(named) in serve_fails(node)
        assert not path.exists()
        aside.rename(path)
    node.start()
    check_serves(cluster, journal)
    check_equal(cluster)


def test_secondary_that_lost_its_state(make_cluster: MakeCluster) -> None:
    """Fault 31, T2, X1: its daemon does not start, and says what is missing; created anew it gets
    a first synchronisation, by hash: the facet that is still there is not sent again; without the
    facet, its content is. Runbook: secondary loses its disk."""
    cluster = small_group(make_cluster)
    journal = Journal(SIZE)
    write(cluster, journal, batches=90)
    check_equal(cluster)
    node, facet = cluster.secondary, cluster.secondary.facets("data")[0]
    for lost in ("state", "facet", "state and facet"):
        node.stop()
        if "state" in lost:
            shutil.rmtree(state_of(node))
        if "facet" in lost:
            facet.unlink()
        assert str(state_of(node) if "state" in lost else facet) in serve_fails(node)
        assert cluster.primary.remote()["state"] == "behind"
        assert node.create().code == (4 if lost == "facet" else 0), "state is never overwritten"
        made = nbdmirror("create", str(node.config), "--role", "secondary", "--force")
        assert made.code == 0, made
        sent = cluster.proxy.sent_bytes
        node.start()
        check_equal(cluster)
        assert resyncs(cluster)[-1]["rule"] == "T2"
        assert resyncs(cluster)[-1]["action"] == "full" and resyncs(cluster)[-1]["why"]
        sent = cluster.proxy.sent_bytes - sent
        assert sent < SESSION_OVERHEAD if lost == "state" else sent > MIB, sent


def test_primary_that_lost_its_state(make_cluster: MakeCluster) -> None:
    """Fault 32: data there, metadata gone: the new identity is refused by the secondary (T1); made
    anew too, it is compared by hash and next to nothing is sent."""
    cluster = small_group(make_cluster)
    journal = Journal(SIZE)
    write(cluster, journal, batches=90)
    check_equal(cluster)
    cluster.primary.stop()
    shutil.rmtree(state_of(cluster.primary))
    assert "create" in serve_fails(cluster.primary)
    assert cluster.primary.create().code == 0
    cluster.primary.start()
    refused(cluster, "T1")
    check_serves(cluster, journal)
    cluster.secondary.stop()
    assert cluster.secondary.create().code == 4, "it needs --force"
    assert cluster.secondary.create("--force").code == 0
    sent = cluster.proxy.sent_bytes
    cluster.secondary.start()
    cluster.primary.rpc("resync", remote="beta")  # what is refused is tried again seldom
    check_equal(cluster)
    assert cluster.proxy.sent_bytes - sent < SESSION_OVERHEAD


# -- rotten ----------------------------------------------------------------------------------------


def flip(path: Path, offset: int) -> None:
    """One bit of the byte at ``offset`` is wrong from now on."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def pending(node: Node) -> list[tuple[int, int]]:
    """(offset in the file, seq) of the records in a node's log, from its beginning."""
    data = memoryview((state_of(node) / "log").read_bytes())
    at, found = LOG_AT, []
    while bytes(data[at : at + 4]) == b"NMR1":
        one = record.parse(data, at)
        found.append((at, one.seq))
        at += record.stored_size(one.kind, one.length)
    return found


@pytest.mark.parametrize("running", [True, False], ids=["running", "restarted"])
def test_rotten_log_record(make_cluster: MakeCluster, running: bool) -> None:
    """Fault 15: a record in the middle of what is pending has a wrong bit: whoever reads it names
    the file; what cannot be sent as records is compared; no write is lost, no node differs."""
    cluster = make_cluster(volumes=[Volume(size=SIZE)], log_size=64 * MIB).start()
    journal = Journal(SIZE)
    check_equal(cluster)
    cluster.proxy.refuse()
    cluster.primary.until("is lost", lambda one: one["link"] != "connected")
    node = cluster.primary
    seed = 0
    while node.remote()["lag"]["bytes"] < 45 * MIB:  # more than is kept in memory
        write(cluster, journal, batches=120, seed=seed)
        seed += 1
    if not running:
        node.kill()
    records = pending(node)
    offset, seq = records[len(records) // 4]
    flip(state_of(node) / "log", offset + 70)
    if not running:
        node.start()
    check_serves(cluster, journal)
    cluster.proxy.heal()
    check_equal(cluster)
    check_message(node, f"{state_of(node)}/log", str(seq))
    check_serves(cluster, journal)


@pytest.mark.parametrize("running", [True, False], ids=["running", "restarted"])
def test_rotten_log_record_of_a_secondary(make_cluster: MakeCluster, running: bool) -> None:
    """Fault 15, X6: what a secondary confirmed and has not applied yet has a wrong bit in its log,
    and the primary's log has let go of it: found, named, nothing of it applied, and what it lacks
    comes from the primary's facet by comparison."""
    cluster = make_cluster(volumes=[Volume(size=SIZE)], log_size=64 * MIB).start()
    journal = Journal(SIZE)
    check_equal(cluster)
    node = cluster.secondary
    node.ok("apply", "freeze")
    seed = 0
    while node.status()["log"]["used"] < 45 * MIB:  # more than is kept in memory
        write(cluster, journal, batches=120, seed=seed)
        seed += 1
    cluster.primary.until("confirmed", lambda one: one["lag"]["records"] == 0)
    if not running:
        node.kill()
    records = pending(node)
    offset, seq = records[len(records) // 4]
    flip(state_of(node) / "log", offset + 70)
    if running:
        node.cli("apply", "thaw")
        wait_until("it has ended", lambda: not node.alive)
        assert node.daemon.stop() == 1
        assert f"record {seq}" in node.daemon.output()
    node.start()
    if not running:
        node.ok("apply", "thaw")
    check_message(node, f"{state_of(node)}/log", str(seq))
    check_equal(cluster)
    check_serves(cluster, journal)


@pytest.mark.parametrize("remote", ["has it", "lacks it"])
@pytest.mark.parametrize("place", [2, 20, 30, 60, 90], ids=["magic", "seq", "range", "sum", "data"])
def test_rotten_last_log_record(make_cluster: MakeCluster, place: int, remote: str) -> None:
    """Fault 15, I5: the last record of all has a wrong bit, in its header or in its data, and
    nothing lies behind it. Within one boot the facet has what it said: recovery takes the log for
    damaged, not for ended there; everything is compared, and no write is lost or left out."""
    cluster = small_group(make_cluster)
    journal = Journal(SIZE)
    write(cluster, journal)
    check_equal(cluster)
    node = cluster.primary
    if remote == "lacks it":
        cluster.proxy.refuse()
        node.until("is lost", lambda one: one["link"] != "connected")
    change = journal.issue(0, 8, zero=False)
    connect(node.uri()).pwrite(b"".join(map(change.content, range(8))), 0)
    change.acknowledged = journal.clock()
    if remote == "has it":
        check_equal(cluster)
    node.kill()
    offset, seq = pending(node)[-1]
    flip(state_of(node) / "log", offset + place)
    node.start()
    check_message(node, f"{state_of(node)}/log", str(seq))
    check_serves(cluster, journal)
    cluster.proxy.heal()
    check_equal(cluster)
    check_serves(cluster, journal)


@pytest.mark.parametrize("stopped", ["cleanly", "killed"])
def test_rotten_superblock_slot(make_cluster: MakeCluster, stopped: str) -> None:
    """Fault 15, O11: the newer slot has a wrong bit: the older may be out of date, so the node
    says so, and everything is compared; with both wrong it refuses."""
    cluster = small_group(make_cluster)
    journal = Journal(SIZE)
    write(cluster, journal)
    node = cluster.primary
    if stopped == "cleanly":
        node.stop()
    else:
        node.kill()
    path = state_of(node) / "superblock"
    images = [path.read_bytes()[at : at + slots.SLOT_SIZE] for at in (0, slots.SLOT_SIZE)]
    newer, _, _ = slots.choose(images)
    flip(path, newer * slots.SLOT_SIZE + 100)
    node.start()
    check_serves(cluster, journal)
    check_message(node, str(path))
    entry = cluster.primary.until(
        "has made up its mind", lambda one: one["state"] in ("refused", "synchronised")
    )
    if entry["state"] == "synchronised":
        check_equal(cluster)
    node.kill()
    for slot in range(slots.SLOT_COUNT):
        flip(path, slot * slots.SLOT_SIZE + 100)
        flip(path, slot * slots.SLOT_SIZE + 101)
    assert str(path) in serve_fails(node)


@pytest.mark.parametrize("fault", ["flipped", "missing"])
def test_rotten_dcm(make_cluster: MakeCluster, fault: str) -> None:
    """Fault 15, X1: a page of the map of a tracked remote is wrong, or the file is gone: all
    regions count as different and are compared; status and events say which file."""
    cluster = make_cluster(volumes=[Volume(size=SIZE)], log_size=4 * MIB).start()
    journal = Journal(SIZE)
    check_equal(cluster)
    cluster.proxy.refuse()
    for seed in range(3):
        write(cluster, journal, batches=90, seed=seed)
    node = cluster.primary
    node.until("is tracked", lambda one: one["state"] == "tracking")
    node.kill()
    path = state_of(node) / "dcm" / "beta.data"
    if fault == "flipped":
        flip(path, mappage.PAGE_SIZE // 2)
    else:
        path.unlink()
    node.start()
    assert str(path) in node.remote()["why"]
    assert node.remote()["dirty"]["bytes"] == SIZE
    cluster.proxy.heal()
    check_equal(cluster)
    check_serves(cluster, journal)


@pytest.mark.parametrize("boot", ["same", "another"])
def test_rotten_active_map(make_cluster: MakeCluster, boot: str) -> None:
    """Fault 15: a sector of the active map is wrong. After a power loss every extent may differ,
    so all is compared, and the message names the file."""
    cluster = small_group(make_cluster)
    journal = Journal(SIZE)
    write(cluster, journal)
    node = cluster.primary
    node.kill()
    path = state_of(node) / "active"
    flip(path, 300)
    if boot == "another":
        reboot(node)
    node.start()
    if boot == "another":
        check_message(node, str(path))
    check_serves(cluster, journal)
    check_equal(cluster)


def test_rotten_facet_is_found_by_comparison(make_cluster: MakeCluster) -> None:
    """Faults 15 and 16, X6: wrong bits in the secondary's facet: a comparison finds and mends
    them, and sends little more than the region."""
    cluster = small_group(make_cluster)
    journal = Journal(SIZE)
    write(cluster, journal, batches=90)
    check_equal(cluster)
    flip(cluster.secondary.facets("data")[0], 3 * MIB + 77)
    sent = cluster.proxy.sent_bytes
    cluster.primary.ok("resync", "beta", "--full", "--wait")
    check_equal(cluster)
    assert cluster.proxy.sent_bytes - sent < SESSION_OVERHEAD + 65536


def test_dump_reads_rotten_state(make_cluster: MakeCluster) -> None:
    """Fault 15: ``dump`` of a damaged node says what is wrong, exit 1, and changes nothing."""
    cluster = small_group(make_cluster)
    write(cluster, Journal(SIZE))
    node = cluster.primary
    node.kill()
    flip(state_of(node) / "active", 300)
    before = {path: path.read_bytes() for path in state_of(node).rglob("*") if path.is_file()}
    result = nbdmirror("dump", "active", str(node.config))
    assert result.code == 1 and "map page 0" in result.err, result
    assert json.loads(nbdmirror("dump", "superblock", str(node.config), "--json").out)
    assert before == {path: path.read_bytes() for path in before}
