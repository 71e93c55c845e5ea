"""Every command and flag through libnbd, and what each promises (issue A point 2; O15).

The numbers of errors are those of the protocol document's table; ``test_nbd_hostile`` holds what
libnbd cannot send.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.integration.conftest import POOL_SIZE, MirroredServer, Server
from tests.integration.tools import connect, extents, nbd_error, pattern

MIB = 1 << 20
KIB = 1 << 10
DF, FUA, NO_HOLE, REQ_ONE, FAST_ZERO = 4, 1, 2, 8, 16
DATA, HOLE_ZERO = 0, 3
ALLOCATION = "base:allocation"


def refused(action: Callable[..., Any], *arguments: Any, flags: int = 0) -> str:
    """The symbol of the error that a call ends with."""
    with pytest.raises(nbd_error()) as caught:
        action(*arguments, flags=flags)
    symbol: str = caught.value.errno
    return symbol


def test_fresh_volume_is_zero_and_sparse(volume: str) -> None:
    """A4: a created facet is sparse, and block status says so."""
    handle = connect(volume, contexts=[ALLOCATION])
    assert handle.get_size() == POOL_SIZE
    assert handle.pread(MIB, 7 * MIB) == bytes(MIB)
    assert extents(handle, ALLOCATION, POOL_SIZE) == [(POOL_SIZE, HOLE_ZERO)]


@pytest.mark.parametrize("offset", [0, 1, 511, 4095, 65535, POOL_SIZE - 9999])
@pytest.mark.parametrize("length", [1, 512, 4097, 9999])
def test_write_read_any_alignment(server: Server, offset: int, length: int) -> None:
    """A2: minimum block 1: any byte range can be written and read, neighbours stay."""
    uri = server.uri(server.volumes[-1])
    handle = connect(uri)
    before = handle.pread(POOL_SIZE, 0)
    data = pattern(length, offset + length)
    handle.pwrite(data, offset)
    expected = before[:offset] + data + before[offset + length :]
    assert handle.pread(POOL_SIZE, 0) == expected


def test_fua_on_every_command(volume: str) -> None:
    """A2: FUA is accepted wherever the protocol allows it, and the effect is there."""
    handle = connect(volume, strict=False)
    handle.pwrite(pattern(4 * MIB, 1), 0, flags=FUA)
    handle.trim(MIB, 0, flags=FUA)
    handle.zero(MIB, MIB, flags=FUA)
    handle.zero(MIB, 2 * MIB, flags=FUA | NO_HOLE)
    handle.flush()
    assert handle.pread(3 * MIB, 0) == bytes(3 * MIB)
    assert handle.pread(MIB, 3 * MIB) == pattern(4 * MIB, 1)[3 * MIB :]


def test_fua_is_ignored_where_it_means_nothing(mirrored: MirroredServer) -> None:
    """nbd.md 1.2: a client may set FUA on all commands; reads and flushes are done as ever."""
    handle = connect(mirrored.uri(mirrored.fresh()), contexts=[ALLOCATION], strict=False)
    assert handle.pread(512, 0, flags=FUA) == bytes(512)
    handle.flush(flags=FUA)
    handle.cache(4096, 0, flags=FUA)
    handle.block_status(4096, 0, lambda *_: 0, flags=FUA)


def test_trim_and_zero_make_holes(volume: str) -> None:
    """A4: TRIM and WRITE_ZEROES give space back; what was zeroed reads as zeros."""
    handle = connect(volume, contexts=[ALLOCATION])
    handle.pwrite(pattern(8 * MIB, 3), 0)
    handle.trim(MIB, MIB)
    handle.zero(MIB, 3 * MIB)
    handle.zero(MIB, 5 * MIB, flags=NO_HOLE)
    handle.flush()
    assert handle.pread(MIB, 3 * MIB) == bytes(MIB)
    assert handle.pread(MIB, 5 * MIB) == bytes(MIB)
    found = extents(handle, ALLOCATION, 8 * MIB)
    starts = [sum(length for length, _ in found[:number]) for number in range(len(found))]
    state = dict(zip(starts, found, strict=True))
    assert state[MIB] == (MIB, HOLE_ZERO)
    assert state[3 * MIB] == (MIB, HOLE_ZERO)


def test_no_hole_keeps_the_space(mirrored: MirroredServer) -> None:
    """A4, nbd.md 1.2: zeros with NO_HOLE stay allocated, on both sides; without it they go."""
    name = mirrored.fresh()
    paths = [node.facets(name)[0] for node in mirrored.cluster.nodes]
    handle = connect(mirrored.uri(name))
    handle.pwrite(pattern(8 * MIB, 3), 0)
    handle.zero(4 * MIB, 0, flags=NO_HOLE)
    handle.flush()
    mirrored.cluster.wait_in_sync()
    assert [path.stat().st_blocks * 512 // MIB for path in paths] == [8, 8]
    handle.zero(4 * MIB, 0)
    handle.flush()
    mirrored.cluster.wait_in_sync()
    assert [path.stat().st_blocks * 512 // MIB for path in paths] == [4, 4]


def test_trim_of_odd_ranges_leaves_neighbours(mirrored: MirroredServer) -> None:
    """A4: a trim that is not aligned to any block does not touch the bytes around it."""
    handle = connect(mirrored.uri(mirrored.fresh()))
    data = pattern(256 * KIB, 4)
    handle.pwrite(data, 0)
    handle.trim(100_001, 5_003)
    assert handle.pread(5_003, 0) == data[:5_003]
    assert handle.pread(KIB, 105_004) == data[105_004 : 105_004 + KIB]
    handle.zero(50_001, 150_007)
    assert handle.pread(50_001, 150_007) == bytes(50_001)
    assert handle.pread(KIB, 200_008) == data[200_008 : 200_008 + KIB]


def test_fast_zero_is_fast_or_changes_nothing(mirrored: MirroredServer) -> None:
    """A2, nbd.md 1.2 and 1.8: FAST_ZERO is done, or ENOTSUP with the data as it was."""
    handle = connect(mirrored.uri(mirrored.fresh()), strict=False)
    assert handle.can_fast_zero()
    data = pattern(MIB, 5)
    handle.pwrite(data, 0)
    try:
        handle.zero(MIB, 0, flags=FAST_ZERO)
    except nbd_error() as error:
        assert error.errno == "ENOTSUP"
        assert handle.pread(MIB, 0) == data
    else:
        assert handle.pread(MIB, 0) == bytes(MIB)


def test_structured_read_shows_holes(native: MirroredServer) -> None:
    """A2: holes travel as holes: chunks cover the range once, and only data is sent."""
    handle = connect(native.uri(native.fresh()))
    assert handle.get_structured_replies_negotiated()
    handle.pwrite(pattern(64 * KIB, 6), MIB)
    chunks: list[tuple[int, int, int]] = []

    def collect(data: bytes, offset: int, kind: int, _error: int) -> None:
        chunks.append((offset, len(data), kind))

    handle.pread_structured(4 * MIB, 0, collect)
    assert sorted(chunks)[0][0] == 0
    ends = [offset + length for offset, length, _ in sorted(chunks)]
    assert ends[-1] == 4 * MIB
    assert [offset for offset, _, _ in sorted(chunks)][1:] == ends[:-1]
    sent = sum(length for _, length, kind in chunks if kind == 1)
    assert sent == 64 * KIB, chunks


@pytest.mark.parametrize("length", [512, 64 * KIB])
def test_df_read_is_one_chunk(volume: str, length: int) -> None:
    """nbd.md 1.1: DF reads of up to 64 KiB come in one piece, holes or not."""
    handle = connect(volume)
    handle.pwrite(pattern(4096, 7), length // 2)
    chunks: list[int] = []

    def collect(data: bytes, *_: int) -> None:
        chunks.append(len(data))

    handle.pread_structured(length, 0, collect, flags=DF)
    assert chunks == [length]


def test_simple_replies(volume: str) -> None:
    """nbd.md 1.6: the kernel's client takes simple replies only."""
    nbd = pytest.importorskip("nbd")
    handle = nbd.NBD()
    handle.set_request_structured_replies(False)
    handle.connect_uri(volume)
    assert not handle.get_structured_replies_negotiated()
    data = pattern(300 * KIB, 8)
    handle.pwrite(data, 777)
    assert handle.pread(len(data), 777) == data


def test_req_one_gives_one_extent(volume: str) -> None:
    """nbd.md 1.2: REQ_ONE: one extent, no longer than the request."""
    handle = connect(volume, contexts=[ALLOCATION])
    handle.pwrite(pattern(4096, 9), 4096)
    seen: list[int] = []

    def collect(_context: str, _offset: int, entries: list[int], _error: int) -> None:
        seen.extend(entries)

    handle.block_status(MIB, 0, collect, REQ_ONE)
    assert seen == [4096, HOLE_ZERO]
    seen.clear()
    handle.block_status(1000, 4096, collect, REQ_ONE)
    assert seen == [1000, DATA]


def test_block_status_over_the_whole_export(volume: str) -> None:
    """nbd.md 1.8.3: a status request as large as can be asked for ends with the export."""
    handle = connect(volume, contexts=[ALLOCATION], strict=False)
    assert sum(length for length, _ in extents(handle, ALLOCATION, POOL_SIZE)) == POOL_SIZE


def test_meta_contexts_are_listed(native: MirroredServer) -> None:
    """A2: ``base:`` and ``nbdmirror:`` are wildcards in LIST; each remote has its context."""
    nbd = pytest.importorskip("nbd")
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(native.uri(native.volumes[0]))
    names: list[str] = []
    handle.opt_list_meta_context(names.append)
    assert sorted(names) == [ALLOCATION, "nbdmirror:dirty:beta"]
    names.clear()
    handle.add_meta_context("base:")
    handle.opt_list_meta_context(names.append)
    assert names == [ALLOCATION]
    handle.opt_abort()


def test_unknown_context_is_not_an_error(volume: str) -> None:
    """nbd.md 1.1: what the server does not know it leaves out."""
    handle = connect(volume, contexts=[ALLOCATION, "x-nobody:knows", "nbdmirror:dirty:nobody"])
    assert handle.can_meta_context(ALLOCATION)
    assert not handle.can_meta_context("x-nobody:knows")
    assert not handle.can_meta_context("nbdmirror:dirty:nobody")


def test_info_then_go(server: Server) -> None:
    """nbd.md 1.1: INFO and GO agree; a refused GO leaves the session usable."""
    nbd = pytest.importorskip("nbd")
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(server.uri("no-such-volume"))
    assert refused_go(handle) == "ENOENT"
    handle.set_export_name(server.volumes[0])
    handle.opt_info()
    size = handle.get_size()
    handle.opt_go()
    assert handle.get_size() == size == POOL_SIZE
    handle.shutdown()


def refused_go(handle: Any) -> str:
    """The symbol of the error of a GO."""
    with pytest.raises(nbd_error()) as caught:
        handle.opt_go()
    symbol: str = caught.value.errno
    return symbol


@pytest.mark.parametrize("over", [0, 1, 4096])
def test_beyond_the_end(volume: str, over: int) -> None:
    """nbd.md 1.2: beyond the end: EINVAL for what reads, ENOSPC for what writes; no hang-up."""
    handle = connect(volume, contexts=[ALLOCATION], strict=False)
    offset = POOL_SIZE - 512 + over
    assert refused(handle.pread, 513, offset) == "EINVAL"
    assert refused(handle.trim, 513, offset) == "EINVAL"
    assert refused(handle.cache, 513, offset) == "EINVAL"
    assert refused(handle.pwrite, bytes(513), offset) == "ENOSPC"
    assert refused(handle.zero, 513, offset) == "ENOSPC"
    assert refused(handle.block_status, 513, offset, lambda *_: 0) == "EINVAL"
    assert handle.pread(512, 0) == bytes(512)


def test_offset_and_length_overflow(volume: str) -> None:
    """nbd.md 1.2: offset + length past 2^64 counts as beyond the end."""
    handle = connect(volume, strict=False)
    assert refused(handle.pread, 4096, 2**63 - 512) == "EINVAL"
    assert refused(handle.pwrite, bytes(4096), 2**63 - 512) == "ENOSPC"
    assert refused(handle.zero, 2**32 - 1, 2**63 - 1) == "ENOSPC"
    assert handle.pread(512, 0) == bytes(512)


def test_flags_that_do_not_belong(mirrored: MirroredServer) -> None:
    """nbd.md 1.2: an unknown flag, or one of another command, is EINVAL and does nothing."""
    handle = connect(mirrored.uri(mirrored.fresh()), contexts=[ALLOCATION], strict=False)
    data = pattern(4096, 10)
    handle.pwrite(data, 0)
    assert refused(handle.pread, 512, 0, flags=NO_HOLE) == "EINVAL"
    assert refused(handle.pwrite, bytes(512), 0, flags=DF) == "EINVAL"
    assert refused(handle.pwrite, bytes(512), 0, flags=1 << 14) == "EINVAL"
    assert refused(handle.trim, 512, 0, flags=FAST_ZERO) == "EINVAL"
    assert refused(handle.zero, 512, 0, flags=REQ_ONE) == "EINVAL"
    assert refused(handle.flush, flags=NO_HOLE) == "EINVAL"
    assert handle.pread(4096, 0) == data


def test_block_status_without_a_context(mirrored: MirroredServer) -> None:
    """nbd.md 1.2: EINVAL, and the session goes on."""
    handle = connect(mirrored.uri(mirrored.fresh()), strict=False)
    assert refused(handle.block_status, 512, 0, lambda *_: 0) in ("EINVAL", "ENOTSUP")
    assert handle.pread(512, 0) == bytes(512)


def test_zero_length_requests_do_not_disconnect(mirrored: MirroredServer) -> None:
    """nbd.md 1.2: a length of 0 is unspecified; a server answers something and stays."""
    handle = connect(mirrored.uri(mirrored.fresh()), contexts=[ALLOCATION], strict=False)
    calls: list[tuple[Callable[..., Any], list[Any]]] = [
        (handle.pread, [0, 0]),
        (handle.pwrite, [b"", 0]),
        (handle.trim, [0, 0]),
        (handle.zero, [0, 0]),
        (handle.cache, [0, 0]),
        (handle.block_status, [0, 0, lambda *_: 0]),
    ]
    for call, arguments in calls:
        try:
            call(*arguments)
        except nbd_error() as error:
            assert error.errno in ("EINVAL", "ENOSPC")
        assert handle.pread(512, 0) == bytes(512)


def test_multi_conn_write_flush_then_read_elsewhere(volume: str) -> None:
    """A2, O15: CAN_MULTI_CONN is true: a reply on one connection is seen on every other."""
    first, second = connect(volume), connect(volume)
    assert first.can_multi_conn()
    for number in range(200):
        data = pattern(4096, number)
        first.pwrite(data, number * 4096)
        assert second.pread(4096, number * 4096) == data
        if number % 20 == 0:
            second.flush()


def test_overlapping_writes_in_flight_end_as_one_of_them(volume: str) -> None:
    """semantics 2: overlapping requests in flight are executed in one order, never mixed."""
    handle = connect(volume)
    nbd = pytest.importorskip("nbd")
    length = 64 * KIB
    buffers = []
    for value in range(1, 60):
        buffers.append(nbd.Buffer.from_bytearray(bytearray([value]) * length))
        handle.aio_pwrite(buffers[-1], 4096, completion=lambda error: 1)
    while handle.aio_in_flight():
        handle.poll(-1)
    found = handle.pread(length, 4096)
    assert len(set(found)) == 1, "two writes were mixed"
    assert 1 <= found[0] <= 59, "the content of one of the writes"


def test_many_requests_in_flight(volume: str) -> None:
    """A2, I6: more requests than the server takes at once are all answered, and right."""
    handle = connect(volume)
    nbd = pytest.importorskip("nbd")
    buffers = [nbd.Buffer.from_bytearray(bytearray(pattern(4096, n))) for n in range(1500)]
    for number, buffer in enumerate(buffers):
        handle.aio_pwrite(buffer, number * 4096, completion=lambda error: 1)
    while handle.aio_in_flight():
        handle.poll(-1)
    for number in range(0, 1500, 7):
        assert handle.pread(4096, number * 4096) == pattern(4096, number)


@pytest.mark.parametrize("size", [MIB, 32 * MIB])
def test_large_requests(volume: str, size: int) -> None:
    """A2, nbd.md 1.6: the kernel really sends 32 MiB."""
    handle = connect(volume)
    data = pattern(size, 12)
    handle.pwrite(data, 0)
    assert handle.pread(size, 0) == data
    handle.zero(size, 0)
    assert handle.pread(size, 0) == bytes(size)
