"""Clients that people use, against both front ends (issue A points 2, 3 and 7).

Every volume is mirrored: what the clients left behind is compared between the two nodes when the
module ends (``MirroredServer.close``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import POOL_SIZE, MirroredServer, Server
from tests.integration.tools import connect, fio, pattern, requires, run, run_json

MIB = 1 << 20
KIB = 1 << 10


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw file as large as a volume: data, holes, odd boundaries."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(POOL_SIZE)
        for number, (offset, length) in enumerate(
            [(0, 3 * MIB), (5 * MIB + 512, 70 * KIB), (16 * MIB, 8 * MIB), (POOL_SIZE - 4096, 4096)]
        ):
            file.seek(offset)
            file.write(pattern(length, number))
    return path


@requires("nbdinfo")
def test_nbdinfo_sees_every_feature(volume: str) -> None:
    """A2: what an export must announce."""
    (export,) = run_json("nbdinfo", "--json", volume)["exports"]
    assert export["export-size"] == POOL_SIZE
    for feature in (
        "can_flush",
        "can_fua",
        "can_trim",
        "can_zero",
        "can_df",
        "can_cache",
        "can_multi_conn",
    ):
        assert export[feature] is True, feature
    assert export["is_read_only"] is False
    assert export["is_rotational"] is False
    assert "base:allocation" in export["contexts"]


def test_block_sizes(mirrored: MirroredServer) -> None:
    """A2, nbd.md 1.4: minimum 1 (nbd-client never asks), preferred 4096, maximum 32 MiB."""
    handle = connect(mirrored.uri(mirrored.volumes[0]))
    assert [handle.get_block_size(which) for which in range(3)] == [1, 4096, 32 * MIB]


@requires("nbdinfo")
def test_list_names_every_export(server: Server) -> None:
    """A2: many exports in one daemon."""
    listed = run_json("nbdinfo", "--list", "--json", server.uri())
    names = [export["export-name"] for export in listed["exports"]]
    assert sorted(names) == server.volumes


@requires("nbdinfo")
def test_default_export_is_the_first_volume(server: Server) -> None:
    """A2: the empty name is an export too."""
    handle = connect(server.uri())
    other = connect(server.uri(server.volumes[0]))
    handle.pwrite(b"default!", 8)
    assert other.pread(8, 8) == b"default!"


@requires("nbdinfo")
def test_map_shows_data_and_holes(server: Server, volume: str) -> None:
    """A2: base:allocation, as ``nbdinfo --map`` reads it."""
    handle = connect(volume)
    handle.pwrite(pattern(MIB, 1), 4 * MIB)
    handle.flush()
    extents = run_json("nbdinfo", "--map", "--json", volume)
    assert sum(extent["length"] for extent in extents) == POOL_SIZE
    data = [(extent["offset"], extent["length"]) for extent in extents if extent["type"] == 0]
    assert data == [(4 * MIB, MIB)]


@requires("nbdcopy")
@pytest.mark.parametrize("connections", [1, 4])
def test_nbdcopy_in_and_out(volume: str, image: Path, tmp_path: Path, connections: int) -> None:
    """A7: a whole image in and out, sparse, over one and four connections."""
    out = tmp_path / "out"
    many = f"--connections={connections}"
    run("nbdcopy", many, "--flush", str(image), volume)
    run("nbdcopy", many, volume, str(out))
    run("cmp", str(image), str(out))
    assert out.stat().st_blocks * 512 < 13 * MIB, "holes became data"


@requires("nbdcopy")
def test_nbdcopy_largest_requests(volume: str, image: Path, tmp_path: Path) -> None:
    """A2: requests of 32 MiB, the advertised maximum, both ways, synchronously."""
    out = tmp_path / "out"
    run("nbdcopy", "--synchronous", "--request-size=33554432", str(image), volume)
    run("nbdcopy", "--synchronous", "--request-size=33554432", volume, str(out))
    run("cmp", str(image), str(out))


@requires("nbdcopy")
def test_nbdcopy_between_volumes(server: Server, image: Path) -> None:
    """A7: one daemon is source and destination at once."""
    first, second = server.uri(server.fresh()), server.uri(server.fresh())
    run("nbdcopy", str(image), first)
    run("nbdcopy", "--allocated", first, second)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), second)


@requires("qemu-img")
def test_qemu_img_convert_and_compare(volume: str, image: Path, tmp_path: Path) -> None:
    """A7: the second independent client, in and out, 16 coroutines, out of order."""
    out = tmp_path / "out"
    convert = ("qemu-img", "convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw")
    run(*convert, str(image), volume)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), volume)
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", volume, str(out))
    run("cmp", str(image), str(out))


@requires("qemu-img")
def test_qemu_img_map_and_info(volume: str) -> None:
    """A7: qemu reads size and allocation."""
    connect(volume).pwrite(pattern(MIB, 2), 8 * MIB)
    assert run_json("qemu-img", "info", "--output=json", volume)["virtual-size"] == POOL_SIZE
    extents = run_json("qemu-img", "map", "-f", "raw", "--output=json", volume)
    data = [(extent["start"], extent["length"]) for extent in extents if extent["data"]]
    assert data == [(8 * MIB, MIB)]


@requires("qemu-img")
def test_qemu_img_bench(volume: str) -> None:
    """A7: qemu's own load, 64 requests in flight, writes with a flush after every 64."""
    run("qemu-img", "bench", "-f", "raw", "-c", "2000", "-d", "64", "-s", "4096", volume)
    write = ("qemu-img", "bench", "-f", "raw", "-w", "-c", "2000", "-d", "64", "-s", "4096")
    run(*write, "--flush-interval=64", volume)


@requires("qemu-io")
def test_qemu_io_commands(volume: str) -> None:
    """A7: write, FUA, write zeroes, zeroes with unmap, discard, odd offsets, and reads of each."""
    script = [
        "write -P 0x11 0 1M",
        "write -f -P 0x22 65536 4096",
        "write -z 131072 65536",
        "write -z -u 262144 65536",
        "discard 524288 65536",
        "write -P 0x33 1000001 77",
        "flush",
        "read -P 0x11 0 65536",
        "read -P 0x22 65536 4096",
        "read -P 0 131072 65536",
        "read -P 0 262144 65536",
        "read -P 0x33 1000001 77",
        "aio_write -P 0x44 2M 1M",
        "aio_write -P 0x55 4M 1M",
        "aio_flush",
        "read -P 0x44 2M 1M",
        "read -P 0x55 4M 1M",
    ]
    argv = [part for command in script for part in ("-c", command)]
    output = run("qemu-io", "-f", "raw", *argv, volume)
    assert "failed" not in output, output
    assert "error" not in output.lower(), output


@requires("fio")
@pytest.mark.parametrize(
    ("rw", "bs", "depth"),
    [
        ("randwrite", "4k", 1),
        ("randwrite", "4k", 64),
        ("randwrite", "512-16k", 16),
        ("write", "256k", 8),
        ("randrw", "4k", 32),
    ],
)
def test_fio_verify(volume: str, tmp_path: Path, rw: str, bs: str, depth: int) -> None:
    """A7: what fio wrote is what it reads, block by block, at many depths."""
    sizes: dict[str, Any] = {"bsrange": bs} if "-" in bs else {"bs": bs}
    job = fio(
        volume,
        tmp_path,
        rw=rw,
        iodepth=depth,
        size="16m",
        verify="crc32c",
        verify_fatal=1,
        do_verify=1,
        fsync=32,
        **sizes,
    )
    assert job["write"]["total_ios"] > 0
    assert job["read"]["total_ios"] > 0, "nothing was verified"


@requires("fio")
def test_fio_four_connections(volume: str, tmp_path: Path) -> None:
    """A2: multi-conn: four writers, each verifying its own part."""
    fio(
        volume,
        tmp_path,
        rw="randwrite",
        bs="4k",
        iodepth=16,
        numjobs=4,
        size="6m",
        offset_increment="6m",
        verify="crc32c",
        verify_fatal=1,
        do_verify=1,
        group_reporting=True,
    )


@requires("nbdinfo")
def test_tcp_listener(mirrored: MirroredServer) -> None:
    """A2: the same volumes over TCP."""
    primary = mirrored.cluster.primary
    name = mirrored.fresh()
    connect(primary.uri(name, tcp=True)).pwrite(b"over tcp", 4096)
    assert connect(primary.uri(name)).pread(8, 4096) == b"over tcp"


@requires("nbdinfo")
def test_uris_in_status_work(mirrored: MirroredServer) -> None:
    """A6: what status prints can be pasted into a client; clients are counted."""
    (entry, *_) = mirrored.cluster.primary.status()["volumes"]
    assert entry["uris"], "no URI"
    handles = [connect(uri) for uri in entry["uris"]]
    (entry, *_) = mirrored.cluster.primary.status()["volumes"]
    assert entry["clients"] == len(handles), json.dumps(entry)
