"""A group on two machines: what is done to them, what was promised, what is checked.

Owns the configuration of both nodes, the proxy between them, the promise, the counts of what was
seen. When something happens is drawn by ``campaign``; what must hold afterwards is here.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.blocktrace import copy
from tests.guest.cuts.agent import ADMIN, NBD
from tests.guest.cuts.disk import CutDisk, Fate
from tests.guest.cuts.image import judge_image
from tests.guest.cuts.load import Found, Wrong
from tests.guest.cuts.machine import Machine
from tests.guest.guest import HOST_ADDRESS
from tests.integration.cluster import MIB
from tests.integration.process import free_port
from tests.integration.proxy import Proxy
from tests.integration.test_replication import SESSION_OVERHEAD

STATE = Path("/srv/node")
REPLICATION_PORT = 10810
SIZE = 48 * MIB
REGION = 64 << 10
DISK = 160 * MIB
IN_SYNC_S = 600.0
STALL_S = 30.0
"""In so long a client's transaction ends, whatever becomes of the secondary (I8)."""
DAMAGE = ("log-damaged", "active-map-damaged", "facet-failed", "failed", "defect")
"""Events that no power cut is a reason for."""
TORN = "superblock-damaged"
Json = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What a pair is made of. ``facet``: a file beside the state, or a disk (block device).
    ``eager``: see ``jobs/node.sh``."""

    facet: str = "file"
    journal: str = "wal"
    fio: str = "ioengine=psync"
    mount: str = "noatime"
    log_mib: int = 16
    extent_kib: int = 1024
    hot_extents: int = 1024
    eager: str = ""


class Pair:
    """The two machines; a context manager. ``alpha`` is the primary."""

    def __init__(self, directory: Path, options: Options) -> None:
        self.options = options
        self.promise = Found()
        self.seen: Counter[str] = Counter()
        """What happened how often: for telling what a campaign has covered."""
        self._directory = directory
        directory.mkdir(parents=True)
        port = free_port()
        self.proxy = Proxy(f"127.0.0.1:{port}")
        self.beta = self._machine("beta", "secondary", {port: REPLICATION_PORT})
        self.alpha = self._machine("alpha", "primary", {})
        self.machines = (self.alpha, self.beta)

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_exc: object) -> None:
        for machine in self.machines:
            machine.close()
        self.proxy.close()

    # -- making ----------------------------------------------------------------------------------

    def _machine(self, name: str, role: str, forwards: dict[int, int]) -> Machine:
        options = self.options
        disks = [CutDisk(self._directory / f"{name}.state", DISK)]
        disks[0].format()
        facet = STATE / "data.img"
        if options.facet == "block":
            disks.append(CutDisk(self._directory / f"{name}.facet", SIZE))
            facet = Path("/dev/vdc")
        scratch = self._directory / f"{name}.copy"
        with scratch.open("wb") as file:
            file.truncate(SIZE)
        config = self._directory / f"{name}.toml"
        config.write_text(self._config(name, role, facet))
        settings = {
            "config": str(config),
            "role": role,
            "facet": str(facet),
            "journal": options.journal,
            "fio": options.fio,
            "mount_options": options.mount,
        }
        return Machine(
            name, STATE, settings, disks, scratch, forwards, self._report, eager=options.eager
        )

    def _config(self, name: str, role: str, facet: Path) -> str:
        options = self.options
        lines = [
            'group = "db"',
            f'node = "{name}"',
            f'state_dir = "{STATE}/state"',
            "[admin]",
            f'socket = "{ADMIN}"',
            "[log]",
            f'size = "{options.log_mib}MiB"',
            f'extent_size = "{options.extent_kib}KiB"',
            f"hot_extents = {options.hot_extents}",
            "[[volume]]",
            'name = "data"',
            f"size = {SIZE}",
            f"region_size = {REGION}",
            f'facets = ["{facet}"]',
        ]
        if role == "primary":
            lines += [
                "[nbd]",
                f'listen = ["unix:{NBD}"]',
                "[[remote]]",
                'name = "beta"',
                f'address = "tcp:{HOST_ADDRESS}:{self.proxy.port}"',
            ]
        lines += ["[replication]", "insecure = true"]
        if role == "secondary":
            lines += [f'listen = "tcp:0.0.0.0:{REPLICATION_PORT}"']
        # Guests are slow, and take each other's silence for a lost link in seconds all the same.
        lines += ["heartbeat_seconds = 1.0", "timeout_seconds = 6.0", "reconnect_max_seconds = 1.0"]
        return "\n".join(lines) + "\n"

    def begin(self) -> None:
        """Both machines up, the first synchronisation done, the load at work."""
        for machine in self.machines:
            machine.power_on()
        for machine in self.machines:
            machine.connect()
        self._each("create")
        for machine in self.machines:
            machine.created = True
        self._each("ready")
        self.wait_in_sync()
        self.alpha.ask("attach", make=True)
        self.alpha.ask("load")

    def _report(self, message: Json) -> None:
        self.promise = Found(**{**vars(self.promise), **message})

    def _each(self, what: str, **arguments: object) -> list[Any]:
        """Both agents at the same time."""
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda machine: machine.ask(what, **arguments), self.machines))

    # -- what happens ----------------------------------------------------------------------------

    def cut(
        self, machines: Iterable[Machine], fate: Fate, rng: random.Random, *, silent: bool
    ) -> None:
        """These lose their power, and are off the network from then on. ``silent``: nobody is
        told; otherwise connections end with a reset."""
        if silent or fate is not Fate.KEPT:
            self.proxy.cut()
        for machine in machines:
            self.seen["unflushed writes"] += machine.cut(fate, rng)
            self.seen[f"cuts of {machine.name}, {fate.value}"] += 1
        if not silent:
            self.proxy.refuse()

    def power_on(self, machines: Iterable[Machine]) -> None:
        """These get their power back; without a link, and what was on its way is gone."""
        self.isolate()
        for machine in machines:
            machine.power_on()

    def lie(self) -> None:
        """From now on the disks ignore flushes: something must be found wrong."""
        for machine in self.machines:
            machine.lie()

    def isolate(self) -> None:
        """No link; what was on its way is gone."""
        self.proxy.refuse()

    def join(self) -> None:
        """The link is there again."""
        self.proxy.heal()

    def wait_in_sync(self) -> None:
        """By itself, in a bounded time (I2)."""
        params = {"until": "in-sync", "timeout": IN_SYNC_S}
        self.alpha.ask("ask", method="wait", params=params, seconds=IN_SYNC_S + 10)

    # -- what must hold --------------------------------------------------------------------------

    def recovered(self, machine: Machine) -> None:
        """The node knows that it lost power, and finds no damage where there is none."""
        events: list[Json] = machine.ask("events")
        (started,) = [event for event in events if event["kind"] == "started"]
        if not started["power_loss"]:
            raise Wrong(f"{machine.name} takes it for no power loss: {started}")
        self.seen[f"{machine.name} back: records redone"] += started["records"]
        for event in events:
            if event["kind"] in DAMAGE:
                raise Wrong(f"{machine.name}: {event}")
            if event["kind"] == TORN:
                self.seen[f"{machine.name} back: a save was torn"] += 1

    def count_handshakes(self) -> None:
        """What the primary, since it started, decided when it met the secondary."""
        for event in self.alpha.ask("events"):
            if event["kind"] == "handshake":
                self.seen[f"handshakes: {event['action']} {event['rule']}"] += 1

    def secondary_alone(self, least_seq: int = 0) -> Path | None:
        """The secondary, as it is now, is a prefix (V7, I1), and holds record ``least_seq`` that
        it had acknowledged as durable (O4). Returns a copy of its facet; None if it says that it
        is not consistent, as it must during a resync."""
        upstream: Json = self.beta.ask("alone")
        if not upstream["consistent"]:
            self.seen["secondary alone: inconsistent, and says so"] += 1
            return None
        if upstream["applied_seq"] < least_seq:
            raise Wrong(
                f"the secondary had acknowledged record {least_seq} as durable, and has "
                f"{upstream['applied_seq']}"
            )
        image = self._directory / "former"
        copy(self._copy(self.beta), image)
        judge_image(image)
        self.seen["secondary alone: a prefix"] += 1
        return image

    def primary_back(self) -> None:
        """The primary recovered: what its client finds through /dev/nbd0 is whole, and holds all
        that was promised (I3). The load goes on from there."""
        self.alpha.ask("attach")
        found = Found(**self.alpha.ask("judge", files_least=self.promise.files))
        if found.rows < self.promise.rows:
            raise Wrong(f"row {self.promise.rows} was committed, the last one is {found.rows}")
        self.seen["primary back: rows beyond the promise"] += found.rows - self.promise.rows
        self.promise = found
        self.alpha.ask("load")

    def equal(self) -> None:
        """In sync, and then equal bit for bit (I2), while nothing is written."""
        self.wait_in_sync()
        with ThreadPoolExecutor() as pool:
            self.compare(*pool.map(self._copy, self.machines))
        self.seen["compared, equal"] += 1

    @staticmethod
    def compare(ours: Path, theirs: Path) -> None:
        """Wrong unless two images are equal."""
        different = _regions(ours, theirs)
        if different:
            raise Wrong(f"the facets differ in {len(different)} regions: {different[:10]}")

    def equal_under_way(self) -> None:
        """``equal`` in the middle of the load, which goes on afterwards."""
        self.promise = Found(**self.alpha.ask("quiet"))
        self.equal()
        self.alpha.ask("move")
        self.alpha.ask("load")

    def equal_with_little_sent(self, former: Path | None) -> None:
        """``equal`` while no client is there; and after a power loss of the primary no more was
        sent than the regions that differ from what the secondary had, and hashes (I4)."""
        sent = self.proxy.sent_bytes
        self.join()
        self.equal()
        if former is None:
            return
        handshakes = [event for event in self.alpha.ask("events") if event["kind"] == "handshake"]
        if len(handshakes) != 1 or handshakes[0]["action"] == "full":
            raise Wrong(f"the link was there, and yet: {handshakes}")
        bound = len(_regions(former, self.alpha.scratch)) * REGION + SESSION_OVERHEAD
        sent = self.proxy.sent_bytes - sent
        if handshakes[0]["rule"] == "T7" and sent > bound:
            raise Wrong(f"{sent} bytes were sent, {bound} would have done")

    def load_goes_on(self) -> None:
        """Transactions end while the secondary is away (I8)."""
        rows, waited = self.promise.rows, 0.0
        while self.promise.rows <= rows + 1:
            if waited > STALL_S:
                raise Wrong(f"no transaction in {STALL_S:g} s without the secondary")
            self.alpha.pass_time(1.0)
            waited += 1.0

    def durable_there(self) -> int:
        """What the secondary has acknowledged as durable, as the primary knows it."""
        (remote,) = self.alpha.ask("ask", method="status", params={})["remotes"]
        return int(remote["durable_seq"])

    def _copy(self, machine: Machine) -> Path:
        """The facet now; until the next time."""
        machine.ask("copy", target="/dev/vdb")
        return machine.scratch


def _regions(one: Path, other: Path) -> list[int]:
    """Numbers of the regions in which two images differ."""
    ours, theirs = one.read_bytes(), other.read_bytes()
    places = range(0, SIZE, REGION)
    return [at // REGION for at in places if ours[at : at + REGION] != theirs[at : at + REGION]]
