"""Reads of a volume: which facet is asked (M5), and what is laid over a remote's answer (M11)."""

from __future__ import annotations

import asyncio

import pytest

from nbdmirror.codec import record as codec
from nbdmirror.codec.record import Record
from nbdmirror.edge.clock import LinuxClock
from nbdmirror.engine.events import EventLog
from nbdmirror.engine.facet import FacetState, LocalFacet
from nbdmirror.engine.log import Log
from nbdmirror.engine.memoryfile import MemoryFile
from nbdmirror.engine.remoteread import Behind, overlay
from nbdmirror.engine.rescue import Rescue
from nbdmirror.engine.volume import AFFINITY_SHIFT, Volume
from nbdmirror.errors import VolumeFailed
from tests.unit.world import make_disk, run

SIZE = 1 << 20
FAR = 1 << AFFINITY_SHIFT


def make(count: int) -> Volume:
    disk = make_disk()
    facets = []
    for number in range(count):
        path = f"/state/facet{number}"
        disk.open(path, create=True).truncate(SIZE)
        facets.append(LocalFacet.open(disk, path, SIZE, FacetState.SYNCHRONISED))
    return Volume(0, "data", "uuid", SIZE, 65536, facets)


def test_stretches_are_dealt_out_and_streams_stay() -> None:
    """M5: idle facets share the volume; a sequential stream stays where it is."""
    volume = make(2)
    first, second = volume.facets
    assert [volume.choose(turn * FAR) for turn in range(4)] == [first, second, first, second]
    second.next_offset = 2 * FAR
    assert volume.choose(2 * FAR) is second


def test_the_facet_with_fewer_reads_outstanding_is_asked() -> None:
    volume = make(3)
    volume.facets[0].outstanding = 2
    volume.facets[1].outstanding = 1
    assert volume.choose(0) is volume.facets[2]
    volume.facets[2].state = FacetState.BEING_SYNCHRONISED
    assert volume.choose(0) is volume.facets[1]


@pytest.mark.parametrize("count", [1, 2])
def test_without_a_facet_in_service_nothing_is_read(count: int) -> None:
    """I5: not even from one that is being synchronised."""

    async def main() -> None:
        volume = make(count)
        for facet in volume.facets:
            facet.state = FacetState.BEING_SYNCHRONISED
        assert volume.choose(0) is None and volume.try_read(0, 512) is None
        assert volume.pieces(0, 512, 9) == [(0, 512, False)]
        with pytest.raises(VolumeFailed, match="no facet of volume data"):
            await volume.read(0, 512)

    run(main())


def test_a_facet_that_has_left_meanwhile_is_not_handed_out() -> None:
    """M8: who awaits something of each, as a verify does, must not come to one that is closed."""
    volume = make(3)
    first, second, third = volume.facets
    assert list(volume.serving(4)) == [second, third, first]
    met = []
    for facet in volume.serving():
        met.append(facet)
        second.leave()
        second.state = FacetState.NOT_SYNCHRONISED
        second.close()
    assert met == [first, third]


def log_with(*records: tuple[int, int, int, bytes | None]) -> Log:
    """A log that begins with record 10; (volume, offset, length, payload; None is a TRIM)."""
    log = Log(MemoryFile(4096 + (1 << 20)), 1 << 20, 0, 10)
    for volume, offset, length, payload in records:
        kind = codec.TRIM if payload is None else codec.WRITE
        record = Record(kind, 0, 1, volume, log.next_seq, offset, length, 0, payload)
        parts = codec.encode(record)
        size = sum(map(len, parts))
        log.append(parts, size, 1)
    return log


def test_the_log_is_laid_over_in_order() -> None:
    """M5: the last record counts, and parts; other volumes do not; what was in changes nothing."""

    async def main() -> None:
        log = log_with(
            (0, 0, 512, b"a" * 512),
            (1, 0, 4096, b"x" * 4096),
            (0, 256, 512, b"b" * 512),
            (0, 1024, 4096, None),
            (0, 1536, 64, b"c" * 64),
        )
        wanted = b"a" * 256 + b"b" * 512 + b"." * 256 + bytes(512) + b"c" * 64 + bytes(448)
        for data, seq in ((b"." * 2048, 9), (b"a" * 512 + b"." * 1536, 10)):
            assert bytes(await overlay(log, 0, 0, data, seq)) == wanted
        piece = await overlay(log, 0, 1500, b"." * 100, 12)
        assert bytes(piece) == bytes(36) + b"c" * 64
        untouched = b"." * 100
        assert await overlay(log, 0, 8192, untouched, 9) is untouched

    run(main())


def test_an_answer_older_than_the_log_is_not_taken() -> None:
    async def main() -> None:
        log = log_with((0, 0, 64, b"a" * 64))
        with pytest.raises(Behind):
            await overlay(log, 0, 0, bytes(64), 8)
        await asyncio.sleep(0)

    run(main())


class Following:
    """A remote that follows, and is out of reach."""

    reads, applied_seq = None, 0

    def __init__(self, name: str = "site2", *, paused: bool = False) -> None:
        self.name = name
        self.changed = asyncio.Event()
        self.facts = {"paused": paused}

    def follows(self, volume: Volume) -> bool:
        return True


def test_a_read_that_waits_for_a_remote_is_served_by_a_facet_that_comes_back() -> None:
    """M11, I8. (Seed 6004560: it failed though the facet was there again.)"""

    async def main() -> None:
        volume = make(1)
        (facet,) = volume.facets
        facet.pwrite(512, b"here" * 128)
        facet.state = FacetState.NOT_SYNCHRONISED
        remote = Following()
        Rescue([volume], [remote], EventLog(LinuxClock(), 100), lost)  # type: ignore[list-item]
        reading = asyncio.ensure_future(volume.read(512, 512))
        await asyncio.sleep(0.5)
        assert not reading.done()
        facet.state = FacetState.SYNCHRONISED
        remote.changed.set()
        assert bytes(await reading) == b"here" * 128

    async def lost(volume: Volume, facet: LocalFacet) -> None:
        raise AssertionError("no facet failed")

    run(main())


def test_a_volume_that_has_ended_does_not_go_on() -> None:
    """M11: nobody stood in when its last facet failed, and the superblock rests on that, whoever
    follows a moment later. (Aim ``lost_spilled``, seed 14: an acknowledged write was lost.)"""

    async def lost(volume: Volume, facet: LocalFacet) -> None:
        raise AssertionError("no facet failed")

    volume = make(1)
    rescue = Rescue([volume], [Following()], EventLog(LinuxClock(), 100), lost)  # type: ignore[list-item]
    volume.facets[0].state = FacetState.NOT_SYNCHRONISED
    assert rescue.goes_on(volume)
    volume.ended = True
    assert not rescue.goes_on(volume)


def test_what_a_volume_without_a_facet_lacks_is_told() -> None:
    """X4, M11: the error of a request, and an event before a read has waited for long, name the
    remote and what is with it."""

    async def lost(volume: Volume, facet: LocalFacet) -> None:
        raise AssertionError("no facet failed")

    async def main() -> None:
        volume, events = make(1), EventLog(LinuxClock(), 100)
        volume.facets[0].state = FacetState.NOT_SYNCHRONISED
        Rescue([volume], [Following(paused=True)], events, lost)  # type: ignore[list-item]
        with pytest.raises(VolumeFailed, match="remote site2 is paused") as refused:
            await volume.read(0, 512)
        assert (
            refused.value.hint == "nbdmirror resume site2 goes on with it, if it holds that still"
        )
        remotes = [Following("paused", paused=True), Following()]
        Rescue([volume], remotes, events, lost)  # type: ignore[arg-type]
        reading = asyncio.ensure_future(volume.read(0, 512))
        while not (told := [e for e in events.since(0).events if e["kind"] == "remote-awaited"]):
            await asyncio.sleep(0.1)
        assert "site2: the link to the remote is lost" in told[0]["why"]
        volume.ended = True
        with pytest.raises(VolumeFailed, match=r"remote site2 did not answer: .*site2: the link"):
            await reading

    run(main())


def test_a_read_that_is_given_up_leaves_nobody_waiting() -> None:
    """I6: of a client that left while its read waited for a remote, nothing is kept."""

    async def lost(volume: Volume, facet: LocalFacet) -> None:
        raise AssertionError("no facet failed")

    async def main() -> None:
        volume, remote = make(1), Following()
        volume.facets[0].state = FacetState.NOT_SYNCHRONISED
        Rescue([volume], [remote], EventLog(LinuxClock(), 100), lost)  # type: ignore[list-item]
        before = len(asyncio.all_tasks())
        reading = asyncio.ensure_future(volume.read(0, 512))
        await asyncio.sleep(0.1)
        assert len(asyncio.all_tasks()) == before + 2
        reading.cancel()
        await asyncio.wait([reading])
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == before

    run(main())
