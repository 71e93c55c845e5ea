"""Where listening sockets come from: what was passed, what is made (issue E, socket activation).

The daemon with passed sockets is in ``tests.integration.test_socket_activation``.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdmirror.configfile import parse
from nbdmirror.edge.sockets import HANDED_ON, Sockets
from nbdmirror.errors import ConfigError

CONFIG = """
group = "db"
node = "alpha"
state_dir = "/var/lib/nbdmirror/db"
[nbd]
listen = ["unix:{path}/nbd", "tcp:127.0.0.1:10809"]
[admin]
socket = "{path}/admin"
[[volume]]
name = "data"
size = "1MiB"
facets = ["data.img"]
"""


@pytest.fixture
def made(tmp_path: Path) -> Iterator[list[socket.socket]]:
    """One at the configuration's first address, one at a port that it does not have."""
    unix, tcp = socket.socket(socket.AF_UNIX), socket.socket()
    unix.bind(f"{tmp_path}/nbd")
    tcp.bind(("127.0.0.1", 0))
    for sock in (unix, tcp):
        sock.listen()
    yield [unix, tcp]
    for sock in (unix, tcp):
        sock.close()


def handed(*passed: tuple[str, str, int | None]) -> Sockets:
    """As a process gets them from its supervisor; the descriptors are its own from then on."""
    own = [(name, at, None if fd is None else os.dup(fd)) for name, at, fd in passed]
    return Sockets.of({HANDED_ON: json.dumps(own)})


def close(sockets: Sockets) -> None:
    for one in sockets.passed:
        if one.socket is not None:
            one.socket.close()


def test_what_was_passed_to_another_process_is_not_ours() -> None:
    for pid in ("1", "", "x"):
        environment = {"LISTEN_PID": pid, "LISTEN_FDS": "3", "LISTEN_FDNAMES": "a:b:c", "HOME": "/"}
        assert Sockets.of(environment).passed == ()
        assert environment == {"HOME": "/"}, "nor is it a child's"
    assert Sockets.of({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "²"}).passed == ()


def test_an_address_takes_its_socket_once(made: list[socket.socket], tmp_path: Path) -> None:
    """And leaves its name alone; the others are made, each with a name to remove."""
    unix, tcp = made
    port = tcp.getsockname()[1]
    sockets = handed(("", "", unix.fileno()), ("", "", tcp.fileno()))

    async def main() -> None:
        for address in (f"unix:{tmp_path}/nbd", f"tcp:127.0.0.1:{port}"):
            taken = await sockets.open(address)
            assert (taken.address, taken.path) == (address, None)
            assert taken.socket in [one.socket for one in sockets.passed]
            assert not taken.socket.getblocking() and not taken.socket.get_inheritable()
            with pytest.raises(OSError):
                await sockets.open(address)
        fresh = await sockets.open(f"unix:{tmp_path}/admin")
        assert fresh.path == f"{tmp_path}/admin"
        fresh.socket.close()

    asyncio.run(main())
    close(sockets)


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    """I9: a runtime directory is gone after a boot; the message says what to make."""
    path = tmp_path / "gone" / "nbd"
    with pytest.raises(FileNotFoundError, match=f"no directory {path.parent}: make it"):
        asyncio.run(Sockets([]).open(f"unix:{path}"))


def test_names_extend_the_configuration(made: list[socket.socket], tmp_path: Path) -> None:
    config = parse(CONFIG.format(path=tmp_path), f"{tmp_path}/db.toml")
    unix, tcp = made
    address = f"tcp:127.0.0.1:{tcp.getsockname()[1]}"
    plain = handed(("anything", "", unix.fileno()))
    assert plain.extended(config) == config
    close(plain)
    for name in ("nbd", "replication", "metrics"):
        sockets = handed((name, "", tcp.fileno()))
        extended = sockets.extended(config)
        found = {
            "nbd": extended.nbd.listen[-1],
            "replication": extended.replication.listen,
            "metrics": extended.admin.metrics,
        }
        assert [key for key, value in found.items() if value == address] == [name]
        assert sockets.extended(extended) == extended
        close(sockets)
    for name in ("admin", "other", ""):
        sockets = handed((name, "", tcp.fileno()))
        with pytest.raises(ConfigError, match=address):
            sockets.extended(config)
        close(sockets)


def test_what_is_not_claimed_is_handed_on(made: list[socket.socket], tmp_path: Path) -> None:
    """The supervisor keeps NBD's; the node's process knows of them and takes the others."""
    unix, tcp = made
    sockets = handed(("nbd", "", unix.fileno()), ("metrics", "", tcp.fileno()))
    asyncio.run(sockets.open(f"unix:{tmp_path}/nbd"))
    fds, told = sockets.handed_on(7)
    assert len(fds) == 1
    address = f"tcp:127.0.0.1:{tcp.getsockname()[1]}"
    assert json.loads(told) == [["nbd", f"unix:{tmp_path}/nbd", None], ["metrics", address, 7]]
    child = handed(*[(n, a, None if fd is None else fds[fd - 7]) for n, a, fd in json.loads(told)])
    config = child.extended(parse(CONFIG.format(path=tmp_path), f"{tmp_path}/db.toml"))
    assert config.admin.metrics == address
    taken = asyncio.run(child.open(address))
    assert taken.socket.getsockname() == tcp.getsockname()
    close(child)
    close(sockets)


@pytest.mark.parametrize("kind", ["not listening", "datagrams", "no path", "no socket", "closed"])
def test_what_cannot_serve_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    file = (tmp_path / "file").open("rb")
    sock = socket.socket(socket.AF_UNIX if kind == "no path" else socket.AF_INET)
    if kind == "datagrams":
        sock.close()
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    if kind == "no path":
        sock.bind(f"\0nbdmirror-test-{os.getpid()}")
        sock.listen()
    fd = os.dup(file.fileno() if kind == "no socket" else sock.fileno())
    sock.close()
    file.close()
    if kind == "closed":
        os.close(fd)
    with pytest.raises(ConfigError, match=f"{fd} that was passed"):
        Sockets.of({HANDED_ON: json.dumps([("nbd", "", fd)])})
    if kind == "no socket":
        os.close(fd)
