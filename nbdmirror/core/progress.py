"""The progress of a resync or a verify, as people see it (X3, X4). Pure; the caller brings time.

``done_bytes`` never falls within a pass and never passes ``total_bytes``, which stays as it was
when the pass began: what is marked behind the walk belongs to the next pass. The time left is
judged by how fast what is left shrinks, so it does not promise an end while a client marks as
fast as the link copies.
"""

from __future__ import annotations

from typing import Any

from nbdmirror.core.meter import Meter


class Progress:
    """One run; passes follow each other."""

    def __init__(self, kind: str, total_bytes: int, *, phase: str) -> None:
        self.kind = kind
        self.phase = phase
        """``passes``: over the map, while changes are marked; ``ordered``: changes are forwarded
        in order, what is marked is copied between them; ``verify``."""
        self.number = 1
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self.sent_bytes = 0
        self.skipped_bytes = 0
        self._done = Meter()
        self._shrunk = Meter()
        self._left = total_bytes

    def next_pass(self, phase: str, total_bytes: int) -> None:
        """What is marked now is gone over."""
        self.number += 1
        self.phase = phase
        self.total_bytes = total_bytes
        self.done_bytes = 0

    def moved(self, now: float, done: int, left: int) -> None:
        """``done`` more bytes of this pass; ``left`` bytes are to do now, over all passes."""
        self.done_bytes = min(self.done_bytes + done, self.total_bytes)
        self._done.add(now, done)
        self._shrunk.add(now, self._left - left)
        self._left = left

    def rate(self, now: float) -> float:
        """Bytes of the volume a second, recently."""
        return self._done.rate(now)

    def status(self, now: float) -> dict[str, Any]:
        """The ``resync`` object of the status."""
        eta = self._shrunk.eta(now, self._left)
        return {
            "kind": self.kind,
            "phase": self.phase,
            "pass": self.number,
            "done_bytes": self.done_bytes,
            "total_bytes": self.total_bytes,
            "sent_bytes": self.sent_bytes,
            "skipped_bytes": self.skipped_bytes,
            "rate": round(self.rate(now)),
            "eta_s": None if eta is None else round(eta, 1),
        }
