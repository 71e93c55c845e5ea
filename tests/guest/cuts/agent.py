"""Inside the guest: does what the test on the host asks, one thing at a time.

Owns the daemon's process, the NBD device, the mount, the load. Connects to the host, reads one
JSON object a line (``do``: a method below without its ``do_``, and its arguments), answers
``{"done": result}`` or ``{"error": text}``; what the load reports goes out in between, each object
with a key of its own. Started by ``jobs/node.sh``; settings come as JSON in the environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from tests.guest.cuts.fsck import check_ext4
from tests.guest.cuts.load import Found, Load, freeze, judge
from tests.integration import rpc
from tests.integration.process import accepts, wait_until

ADMIN = "/run/node.sock"
NBD = "/run/node.nbd"
DEVICE = "/dev/nbd0"
MOUNT = Path("/run/mount")
HOST = "10.0.2.2"
READY_S = 400.0
COPY_BYTES = 1 << 20


def run(*argv: str) -> str:
    """Runs a program; its output, unless it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(argv)} -> {done.returncode}\n{text}"
    return text


class Agent:
    """The methods; ``settings``: port, config, role, facet, journal, fio, mount_options."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._daemon = self._serve() if settings["created"] else None
        self._socket = socket.create_connection((HOST, settings["port"]))
        self._lock = threading.Lock()
        self._load: Load | None = None
        self._found = Found()

    def work(self) -> None:
        """Serves the host until it hangs up."""
        self._send({"hello": self._settings["role"]})
        with self._socket.makefile() as lines:
            for line in lines:
                request = json.loads(line)
                try:
                    answer = {"done": getattr(self, f"do_{request.pop('do')}")(**request)}
                except Exception:
                    answer = {"error": traceback.format_exc()}
                self._send(answer)

    def _send(self, message: dict[str, Any]) -> None:
        # A load that goes on while the host hangs up is about to lose its power.
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    # -- the daemon ------------------------------------------------------------------------------

    def _serve(self) -> subprocess.Popen[bytes]:
        # What it says is in the serial log, which outlives the guest.
        return subprocess.Popen(
            [sys.executable, "-m", "nbdmirror", "serve", self._settings["config"]],
            stdin=subprocess.DEVNULL,
        )

    def do_create(self) -> None:
        """Makes the node, and starts it."""
        role = self._settings["role"]
        config = self._settings["config"]
        run(sys.executable, "-m", "nbdmirror", "create", config, "--role", role)
        run("sync")
        self._daemon = self._serve()

    def do_ready(self) -> None:
        """Returns when the daemon serves."""
        daemon = self._daemon
        assert daemon is not None

        def probe() -> bool:
            assert daemon.poll() is None, f"the daemon ended with {daemon.returncode}"
            return accepts(f"unix:{ADMIN}")

        wait_until("the daemon serves", probe, READY_S)

    def do_ask(self, method: str, params: dict[str, Any], seconds: float = 30.0) -> Any:
        """A request at the admin socket."""
        return rpc.ask(ADMIN, method, params, seconds=seconds)

    def do_events(self) -> list[dict[str, Any]]:
        """What this run of the daemon has seen, oldest first."""
        return rpc.events(ADMIN)

    def do_alone(self) -> dict[str, Any]:
        """A secondary without a primary: its status once it has applied what it has."""

        def probe() -> dict[str, Any] | None:
            status: dict[str, Any] = rpc.ask(ADMIN, "status", {})
            upstream = status["upstream"]
            done = upstream["applied_seq"] == upstream["received_seq"] == upstream["durable_seq"]
            return upstream if done and upstream["link"] == "disconnected" else None

        return wait_until("the secondary has applied all it has", probe, READY_S)

    def do_copy(self, target: str) -> None:
        """Copies the facet to a disk."""
        with open(self._settings["facet"], "rb") as source, open(target, "r+b") as copy:
            while data := source.read(COPY_BYTES):
                copy.write(data)
            copy.flush()
            os.fsync(copy.fileno())

    # -- the volume's client ---------------------------------------------------------------------

    def do_attach(self, make: bool = False) -> None:
        """The volume as a device, its file system checked (or made) and mounted."""
        run("modprobe", "nbd", "nbds_max=1", "max_part=0")
        run("nbd-client", "-unix", NBD, DEVICE, "-N", "data")
        if make:
            run("mkfs.ext4", "-qF", "-J", "size=4", DEVICE)
        check_ext4(DEVICE)
        MOUNT.mkdir(exist_ok=True)
        run("mount", "-o", self._settings["mount_options"], DEVICE, str(MOUNT))

    def do_judge(self, files_least: int) -> dict[str, int]:
        """What is in the mounted file system."""
        self._found = judge(MOUNT, files_least)
        return vars(self._found)

    def do_load(self) -> None:
        """Writes from now on."""
        self._load = Load(
            MOUNT,
            self._found,
            self._send,
            journal=self._settings["journal"],
            fio_options=self._settings["fio"],
        )
        self._load.start()

    def do_quiet(self) -> dict[str, int]:
        """Nothing is written any more: the load ends, and the file system stands still."""
        if self._load is not None:
            self._found = self._load.stop()
            self._load = None
        os.sync()
        freeze(MOUNT, True)
        errors = [line for line in run("dmesg").splitlines() if "I/O error" in line]
        assert not errors, errors
        return vars(self._found)

    def do_move(self) -> None:
        """The end of ``quiet``."""
        freeze(MOUNT, False)


if __name__ == "__main__":
    Agent(json.loads(os.environ["SETTINGS"])).work()
