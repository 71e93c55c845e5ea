"""``nbdmirror demo``: two nodes on this machine, to look at and to attach.

Makes a configuration pair under a directory, creates what is missing, runs both daemons as
processes of their own and prints how to attach and what is going on. ``tour`` shows the main job
by itself: writes, an outage, and both facets equal again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from nbdmirror.cli.client import AdminClient
from nbdmirror.cli.output import discard_output
from nbdmirror.cli.render import Json, status_line, status_text
from nbdmirror.errors import NbdmirrorError, NoDaemon

SIZE = "1GiB"
LOG_SIZE = "128MiB"
READY_SECONDS = 120.0
SYNC_SECONDS = 120.0
REFRESH_SECONDS = 1.0
EXIT_INTERRUPTED = 130

_PRIMARY = """\
group = "demo"
node = "alpha"
state_dir = "{root}/alpha"

[nbd]
listen = ["unix:{root}/alpha.nbd", "tcp:127.0.0.1:{nbd_port}"]

[admin]
socket = "{root}/alpha.sock"

[log]
size = "{log_size}"

[[volume]]
name = "data"
size = "{size}"
facets = ["{root}/alpha/data.img"]

[[remote]]
name = "beta"
address = "tcp:127.0.0.1:{replication_port}"

[replication]
reconnect_max_seconds = 2.0
"""

_SECONDARY = """\
group = "demo"
node = "beta"
state_dir = "{root}/beta"

[admin]
socket = "{root}/beta.sock"

[log]
size = "{log_size}"

[[volume]]
name = "data"
size = "{size}"
facets = ["{root}/beta/data.img"]

[replication]
listen = "tcp:127.0.0.1:{replication_port}"
"""


class Pair:
    """A primary and a secondary under one directory."""

    def __init__(self, root: Path, nbd_port: int, replication_port: int) -> None:
        self.root = root.resolve()
        self._values = {
            "root": self.root,
            "size": SIZE,
            "log_size": LOG_SIZE,
            "nbd_port": nbd_port,
            "replication_port": replication_port,
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def prepare(self) -> None:
        """Writes the configurations and creates the nodes that are not there yet."""
        self.root.mkdir(parents=True, exist_ok=True)
        for node, text, role in (
            ("alpha", _PRIMARY, "primary"),
            ("beta", _SECONDARY, "secondary"),
        ):
            config = self.root / f"{node}.toml"
            config.write_text(text.format(**self._values))
            if not (self.root / node / "superblock").exists():
                self._run("create", str(config), "--role", role, "--force")

    def _run(self, *args: str) -> None:
        command = [sys.executable, "-m", "nbdmirror", *args]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NbdmirrorError(f"{' '.join(args)} failed: {done.stderr.strip()}")

    def start(self, node: str) -> None:
        """Starts a daemon and waits until it answers."""
        with (self.root / f"{node}.log").open("ab") as journal:
            self._daemons[node] = subprocess.Popen(
                [sys.executable, "-m", "nbdmirror", "serve", str(self.root / f"{node}.toml")],
                stdin=subprocess.DEVNULL,
                stderr=journal,
                start_new_session=True,
            )
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                self.status(node)
                return
            except NoDaemon:
                ended = self._daemons[node].poll() is not None
                if ended or time.monotonic() > deadline:
                    journal_path = self.root / f"{node}.log"
                    last = " ".join(journal_path.read_text().strip().splitlines()[-1:])
                    why = last if ended else f"no answer for {READY_SECONDS:g} s"
                    raise NbdmirrorError(
                        f"{node} did not start: {why}", hint=f"see {journal_path}"
                    ) from None
                time.sleep(0.1)

    def status(self, node: str = "alpha") -> dict[str, Any]:
        """The node's status document."""
        with AdminClient(str(self.root / f"{node}.sock")) as client:
            result: dict[str, Any] = client.call("status")
        return result

    def wait_in_sync(self) -> None:
        """Returns when both facets hold the same."""
        with AdminClient(str(self.root / "alpha.sock")) as client:
            client.call(
                "wait",
                {"until": "in-sync", "timeout": SYNC_SECONDS},
                answer_seconds=SYNC_SECONDS * 2,
            )

    def stop(self, node: str | None = None) -> None:
        """Stops one daemon, or both, cleanly."""
        names = [node] if node else list(self._daemons)
        self.tell(names)
        for daemon in [self._daemons.pop(name) for name in names if name in self._daemons]:
            daemon.wait()

    def tell(self, names: Collection[str]) -> None:
        """Tells daemons to stop, and waits for none."""
        for name in names:
            if name in self._daemons:
                self._daemons[name].send_signal(signal.SIGTERM)


def serve(root: Path, nbd_port: int, replication_port: int) -> int:
    """Serves a mirrored volume from both nodes until interrupted (``make run``)."""
    pair = Pair(root, nbd_port, replication_port)
    pair.prepare()
    try:
        pair.start("beta")
        pair.start("alpha")
        _print_how_to_attach(pair, nbd_port)
        _watch(pair)
    except KeyboardInterrupt:
        pair.tell(("alpha", "beta"))  # before anybody presses it again, and this ends
        print("\nstopping both nodes")
    finally:
        pair.stop()
    return 0


def _print_how_to_attach(pair: Pair, nbd_port: int) -> None:
    print("a mirrored volume is served here; the second node holds its copy")
    for uri in pair.status()["volumes"][0]["uris"]:
        print(f"  {uri}")
    print("attach it (as root, where the kernel has nbd):")
    command = Path(sys.executable).with_name("nbdmirror")
    print(f"  {command} attach nbd://127.0.0.1:{nbd_port}/data /dev/nbd0")
    print(f"  nbd-client 127.0.0.1 {nbd_port} -N data -C 4 /dev/nbd0")
    print(f"stop one side to see what happens; its log: {pair.root}/alpha.log, beta.log")
    print("Ctrl-C stops both nodes cleanly; what they hold stays.\n")


def _watch(pair: Pair) -> None:
    """Live status: redrawn on a terminal, a line now and then otherwise."""
    last = ""
    while True:
        try:
            status = pair.status()
            line, screen = status_line(status), status_text(status)
        except NoDaemon:  # somebody has stopped it, to see what happens
            serve_it = f"{sys.executable} -m nbdmirror serve {pair.root}/alpha.toml"
            line = screen = f"alpha does not run; start it with: {serve_it}"
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[2J\x1b[H" + screen + "\n")
        else:
            if line != last:
                print(line)
                last = line
        sys.stdout.flush()
        time.sleep(REFRESH_SECONDS)


def demo(tell: Callable[[Json, str], None]) -> int:
    """A tour of the main job, by itself: write, lose the second node, write on, heal, compare.

    ``tell`` hears of each step, as data and as text."""
    root = Path(tempfile.mkdtemp(prefix="nbdmirror-demo-"))
    pair = Pair(root, _free_port(), _free_port())
    try:
        text = f"1. two nodes under {root}: alpha is primary, beta holds the second copy"
        tell({"step": 1, "directory": str(root)}, text)
        pair.prepare()
        pair.start("beta")
        pair.start("alpha")
        pair.wait_in_sync()
        tell({"step": 1, "in_sync": True}, "   in sync: a new pair has nothing to copy")
        tell({"step": 2, "write_bytes": 64 << 20}, "2. 64 MiB written through NBD")
        _write(pair, 0, 64)
        pair.wait_in_sync()
        _compare(pair, 2, tell)
        text = "3. beta stops; 256 MiB more are written, twice the log"
        tell({"step": 3, "write_bytes": 256 << 20}, text)
        pair.stop("beta")
        _write(pair, 64, 256)
        remote = pair.status()["remotes"][0]
        state, regions = remote["state"], remote["dirty"]["regions"]
        tell(
            {"step": 3, "state": state, "dirty_regions": regions},
            f"   beta is {state}: {regions} regions in its map",
        )
        text = "4. beta comes back; only those regions are copied, by themselves"
        tell({"step": 4}, text)
        pair.start("beta")
        pair.wait_in_sync()
        _compare(pair, 4, tell)
    finally:
        pair.stop()
        shutil.rmtree(root, ignore_errors=True)
    return 0


def _free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


def _write(pair: Pair, start_mib: int, count_mib: int) -> None:
    """Random data through a real NBD client."""
    volume = f"nbd+unix:///data?socket={pair.root}/alpha.nbd"
    code = (
        "import nbd,os\n"
        f"h=nbd.NBD(); h.connect_uri({volume!r})\n"
        f"for i in range({start_mib},{start_mib + count_mib}): h.pwrite(os.urandom(1<<20),i<<20)\n"
        "h.flush(); h.shutdown()\n"
    )
    done = subprocess.run(["/usr/bin/python3", "-c", code], check=False, capture_output=True)
    if done.returncode:
        raise NbdmirrorError(
            f"the client failed: {done.stderr.decode().strip().splitlines()[-1]}",
            hint="the demo needs libnbd for Python: apt-get install python3-libnbd",
        )


def _compare(pair: Pair, step: int, tell: Callable[[Json, str], None]) -> None:
    facets = [str(pair.root / node / "data.img") for node in ("alpha", "beta")]
    subprocess.run(["cmp", *facets], check=True)
    tell({"step": step, "equal": True}, "   cmp: both facets are the same, bit for bit")


def main() -> int:
    """``python -m nbdmirror.cli.demo --state DIR``: serve, as ``make run`` does."""
    parser = argparse.ArgumentParser(prog="nbdmirror.cli.demo")
    parser.add_argument("--state", type=Path, default=Path("run"))
    parser.add_argument("--nbd-port", type=int, default=10809)
    parser.add_argument("--replication-port", type=int, default=10810)
    args = parser.parse_args()
    os.umask(0o077)
    try:
        return serve(args.state, args.nbd_port, args.replication_port)
    except NbdmirrorError as error:
        print(f"nbdmirror: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        discard_output()
        return 0
    except KeyboardInterrupt:  # a second one, while the nodes stop
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
