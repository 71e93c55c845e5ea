"""``Dcm`` and ``ActiveMap`` against what they mean: sets of numbers."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nbdmirror.codec.mappage import BITMAP_BYTES, BITS, SLOTS
from nbdmirror.core.active import ActiveMap
from nbdmirror.core.dcm import WIDE, Dcm

REGIONS = 2 * BITS + 37
EDGES = [0, 1, 7, 8, BITS - 1, BITS, BITS + 1, 2 * BITS - 1, 2 * BITS, REGIONS - 2, REGIONS - 1]
region = st.sampled_from(EDGES) | st.integers(0, REGIONS - 1)
token = st.integers(1, 3)


class DcmMachine(RuleBasedStateMachine):
    """The model: a set of regions, a dict of what is in flight, and the pages on disk."""

    def __init__(self) -> None:
        super().__init__()
        self.dcm = Dcm(REGIONS)
        self.marked: set[int] = set()
        self.in_flight: dict[int, int] = {}
        self.windows: list[tuple[int, int, int]] = []
        self.disk: dict[int, bytes] = {}
        self.default = False

    def written(self, pages: list[int]) -> None:
        assert pages == sorted(set(pages))
        for number in pages:
            self.disk[number] = self.dcm.page_bits(number)
            assert len(self.disk[number]) == BITMAP_BYTES

    @rule(first=region, count=st.sampled_from([1, 2, 9, BITS, 2 * BITS]))
    def mark(self, first: int, count: int) -> None:
        last = min(first + count, REGIONS) - 1
        self.written(self.dcm.mark(first, last))
        self.marked.update(range(first, last + 1))
        for at in [r for r in self.in_flight if first <= r <= last]:
            del self.in_flight[at]

    @rule()
    def fill(self) -> None:
        self.dcm.fill()
        self.marked = set(range(REGIONS))
        self.in_flight, self.disk, self.default = {}, {}, True

    @rule()
    def clear(self) -> None:
        self.dcm.clear()
        self.marked, self.in_flight, self.disk, self.default = set(), {}, {}, False

    @rule(at=region, token=token)
    def begin(self, at: int, token: int) -> None:
        self.dcm.begin(at, 1, token)
        self.in_flight[at] = token

    @rule(at=region, token=token)
    def finish(self, at: int, token: int) -> None:
        pages = self.dcm.finish(at, 1, token)
        if self.in_flight.get(at) != token:
            assert not pages
            return
        del self.in_flight[at]
        assert pages == ([at // BITS] if at in self.marked else [])
        self.marked.discard(at)
        self.written(pages)

    @rule(at=region, count=st.sampled_from([1, WIDE, WIDE + 1, BITS, 3 * BITS]))
    def begin_window(self, at: int, count: int) -> None:
        count, token = min(count, REGIONS - at), 10 + len(self.windows)
        self.dcm.begin(at, count, token)
        self.windows.append((at, count, token))
        self.in_flight.update(dict.fromkeys(range(at, at + count), token))

    @rule(number=st.integers(0, 10))
    def finish_window(self, number: int) -> None:
        if not self.windows:
            return
        at, count, token = self.windows[-1 - number % len(self.windows)]
        done = {r for r, t in self.in_flight.items() if t == token}
        pages = self.dcm.finish(at, count, token)
        assert pages == sorted({r // BITS for r in done & self.marked})
        self.in_flight = {r: t for r, t in self.in_flight.items() if t != token}
        self.marked -= done
        self.written(pages)

    @rule()
    def abandon(self) -> None:
        self.dcm.abandon()
        self.in_flight = {}

    @rule()
    def restart(self) -> None:
        """What was named to be written is all that a new process needs."""
        self.dcm = Dcm(REGIONS)
        if self.default:
            self.dcm.fill()
        for number, bits in self.disk.items():
            self.dcm.load_page(number, bits)
        self.in_flight = {}

    @rule(start=region)
    def runs(self, start: int) -> None:
        at = start
        for first, count in self.dcm.runs(start):
            assert first >= at and count > 0
            assert first in (start, at) or first - 1 not in self.marked
            assert self.marked.isdisjoint(range(at, first))
            assert self.marked.issuperset(range(first, first + count))
            at = first + count
            assert at == REGIONS or at not in self.marked
        assert self.marked.isdisjoint(range(at, REGIONS))

    @invariant()
    def agrees(self) -> None:
        assert self.dcm.count == len(self.marked)
        for at in EDGES:
            assert self.dcm.is_marked(at) == (at in self.marked)


class ActiveMachine(RuleBasedStateMachine):
    """The model: the last write of each extent; the rule: nothing unsafe is ever let go (O6), and
    what is hot stands on disk (O1)."""

    @initialize()
    def start(self) -> None:
        self.map = ActiveMap(SLOTS)
        self.disk = [self.map.sector(n) for n in range(self.map.sectors)]
        self.seq = self.safe = 0
        self.last: dict[int, int] = {}

    @rule(keys=st.sets(st.integers(0, 90), min_size=1, max_size=20), land=st.booleans())
    def activate(self, keys: set[int], land: bool) -> None:
        cold = sorted(keys - set(self.map.hot))
        before = dict(self.map.hot)
        sectors = self.map.admit(cold, self.safe)
        for key, seq in before.items():
            assert key in self.map.hot or seq <= self.safe, "an unsafe extent was let go"
        if sectors is None:
            unsafe = sum(seq > self.safe for seq in before.values())
            assert len(cold) + unsafe > SLOTS, "there was room"
            return
        if not land:
            self.map.withdraw(cold)
            return
        for number in sectors:
            self.disk[number] = self.map.sector(number)
        self.map.enter(cold)

    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        if self.map.hot:
            self.seq += 1
            self.map.hot[data.draw(st.sampled_from(sorted(self.map.hot)))] = self.seq

    @rule(back=st.integers(0, 5))
    def sync(self, back: int) -> None:
        self.safe = max(self.safe, self.seq - back)

    @rule()
    def stop(self) -> None:
        for number in self.map.drop_safe(self.safe):
            self.disk[number] = self.map.sector(number)

    @rule()
    def restart(self) -> None:
        hot = set(self.map.hot)
        self.map = ActiveMap(SLOTS)
        for number, slots in enumerate(self.disk):
            self.map.load(number, slots)
        assert hot <= set(self.map.hot)
        self.safe = self.seq  # recovery made it so

    @invariant()
    def hot_is_on_disk(self) -> None:
        found = {value - 1 for sector in self.disk for value in sector if value}
        assert set(self.map.hot) <= found
        assert len(self.map.hot) <= SLOTS


TestDcm = DcmMachine.TestCase
TestDcm.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestActive = ActiveMachine.TestCase
TestActive.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_resync_under_writes_ends_with_what_was_written_meanwhile() -> None:
    """O6, O13, over many random interleavings of copies in flight and marks."""
    for seed in range(300):
        rng = random.Random(seed)
        dcm = Dcm(64)
        dcm.mark(0, 63)
        remote = [0] * 64
        volume = [0] * 64
        flying: list[tuple[int, int, int]] = []
        version = token = 0
        for _ in range(400):
            choice = rng.random()
            at = rng.randrange(64)
            if choice < 0.2:
                version += 1
                volume[at] = version
                dcm.mark(at, at)
            elif choice < 0.6 and dcm.is_marked(at):
                token += 1
                dcm.begin(at, 1, token)
                flying.append((at, token, volume[at]))
            elif flying:
                at, done, value = flying.pop(0)  # a link keeps the order
                remote[at] = value
                dcm.finish(at, 1, done)
            if choice > 0.995:
                dcm.abandon()
                flying.clear()
        for at in range(64):
            assert dcm.is_marked(at) or remote[at] == volume[at]
