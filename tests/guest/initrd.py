"""The guest's initial file system: busybox, the modules that reach the host's files, the job.

Owns the cpio archive ("newc" format; ``Documentation/driver-api/early-userspace/buffer-format``
of the kernel). All other modules and programs the guest takes from the host's own files.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.guest.kernel import Kernel

HERE = Path(__file__).resolve().parent
BUSYBOX = Path("/bin/busybox")
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "overlay")
SHARE_MODULES = {"virtiofs": ("virtiofs",), "9p": ("9pnet_virtio", "9p")}
DIRECTORIES = ("bin", "dev", "host", "job", "lib", "proc", "root", "run", "sys", "tmp")


def entry(number: int, name: str, mode: int, data: bytes = b"") -> bytes:
    """One member of the archive: header, name, data, each padded to 4 bytes."""
    encoded = name.encode() + b"\0"
    # Inode, mode, uid, gid, links, mtime, size, device (4), name size, checksum (unused).
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    return _padded(head) + _padded(data)


def archive(files: Mapping[str, tuple[int, bytes]], directories: Iterable[str]) -> bytes:
    """An archive of directories and of files: name to (permissions, content)."""
    parts = [entry(n, name, stat.S_IFDIR | 0o755) for n, name in enumerate(directories, 1)]
    for number, (name, (mode, data)) in enumerate(files.items(), len(parts) + 1):
        parts.append(entry(number, name, stat.S_IFREG | mode, data))
    return b"".join([*parts, entry(0, "TRAILER!!!", 0)])


def initrd(kernel: Kernel, job: Mapping[str, tuple[int, bytes]]) -> bytes:
    """What the kernel is started with; ``job`` is put under ``/job`` and overlays nothing."""
    wanted = [*MODULES, *SHARE_MODULES[kernel.share]]
    modules = load_order(kernel, wanted)
    files = {
        "init": (0o755, (HERE / "init.sh").read_bytes()),
        "bin/busybox": (0o755, BUSYBOX.read_bytes()),
        "lib/order": (0o644, "".join(f"/lib/{path.name}\n" for path in modules).encode()),
        **{f"lib/{path.name}": (0o644, path.read_bytes()) for path in modules},
        **{f"job/{name}": content for name, content in job.items()},
    }
    return archive(files, DIRECTORIES)


def load_order(kernel: Kernel, names: Iterable[str]) -> list[Path]:
    """The modules and all that they need, each behind what it needs; built-in ones left out."""
    needs: dict[str, list[str]] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        module, _, rest = line.partition(":")
        # modprobe loads this list from its end.
        needs[module] = rest.split()[::-1]
    by_name = {_module_name(path): path for path in needs}
    order: dict[str, None] = {}
    for path in [by_name[name] for name in names if name in by_name]:
        order.update(dict.fromkeys([*needs[path], path]))
    return [kernel.modules / path for path in order]


def _module_name(path: str) -> str:
    return Path(path).name.partition(".")[0].replace("-", "_")


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
