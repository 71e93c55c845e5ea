"""Facets on block devices, here loop devices over files: both sides, real daemons (M1, A4)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.integration.cluster import MIB, Cluster, Volume
from tests.integration.process import wait_until
from tests.integration.tools import connect, pattern

SIZE = 32 * MIB

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="a loop device needs root"),
    pytest.mark.skipif(shutil.which("losetup") is None, reason="needs losetup"),
]


@contextmanager
def loop_device(image: Path) -> Iterator[str]:
    """A block device over a new, empty file."""
    with image.open("xb") as file:
        file.truncate(SIZE)
    made = subprocess.run(
        ["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.fixture
def on_devices(tmp_path: Path) -> Iterator[tuple[Cluster, list[Path]]]:
    """A group in sync whose facets are devices, and the files under these."""
    cluster = Cluster(tmp_path / "group", volumes=[Volume(size=SIZE)])
    images = [node.directory / "disk" for node in cluster.nodes]
    with ExitStack() as stack:
        for node, image in zip(cluster.nodes, images, strict=True):
            device = stack.enter_context(loop_device(image))
            node.facets("data")[0].symlink_to(device)
        stack.enter_context(cluster)  # it lets go of the devices before they go
        yield cluster.start(), images


def space(cluster: Cluster, images: list[Path]) -> list[int]:
    """What the files under the devices take, in MiB, once all that was written has reached them."""
    for node in cluster.nodes:
        with node.facets("data")[0].open("rb") as device:
            os.fsync(device.fileno())
    return [round(image.stat().st_blocks * 512 / MIB) for image in images]


def test_trim_and_write_zeroes_give_space_back(on_devices: tuple[Cluster, list[Path]]) -> None:
    """A4, O22: the device is told to discard, on both sides; what is left is equal."""
    cluster, images = on_devices
    handle = connect(cluster.primary.uri())
    handle.pwrite(pattern(16 * MIB, 1), 0)
    cluster.check_in_sync()

    def wait_for(mib: int) -> None:
        wait_until(f"{mib} MiB on both", lambda: space(cluster, images) == [mib, mib])

    wait_for(16)
    for ask, left in ((handle.trim, 12), (handle.zero, 8)):
        ask(4 * MIB, (16 - left - 4) * MIB)
        handle.flush()
        cluster.check_in_sync()
        wait_for(left)
    assert handle.pread(16 * MIB, 0) == bytes(8 * MIB) + pattern(16 * MIB, 1)[8 * MIB :]
    handle.pwrite(pattern(MIB, 2), 2 * MIB)
    cluster.primary.kill()
    cluster.primary.start()
    cluster.check_in_sync()
