"""An ext4 after a power cut, by e2fsck: what its journal leaves to be finished is no damage.

Used by ``agent`` in the guest and by ``image`` on the host.
"""

from __future__ import annotations

import os
import re
import subprocess

# An ordinary user's PATH lacks these directories.
ENVIRONMENT = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "LC_ALL": "C"}
_FINISHED_OR_FIXED = (0, 1)
_HARMLESS = re.compile(
    r".*: (recovering journal"
    # Files that were deleted while open, or were being cut short.
    r"|(Clearing|Truncating) orphaned inode \d+ .*"
    # The sums in the superblock are written with the next unmounting only.
    r"|Setting free (inodes|blocks) count to \d+ \(was \d+\)"
    r"|[\d/]+ files \([\d.]+% non-contiguous\), [\d/]+ blocks"
    # The clock of a guest on a busy machine runs ahead.
    r"|Superblock last (mount|write) time is in the future\.)"
    r"|\t\(by less than a day, probably due to the hardware clock being incorrectly set\)"
)


class Damaged(AssertionError):
    """The file system needs to be repaired."""


def check_ext4(path: str) -> None:
    """Replays the journal, checks everything; Damaged if anything else was to be done."""
    done = subprocess.run(
        ["e2fsck", "-fp", path], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    lines = done.stdout.splitlines()
    bad = [line for line in lines if line.strip() and not _HARMLESS.fullmatch(line)]
    if done.returncode not in _FINISHED_OR_FIXED or done.stderr or bad:
        text = "\n".join(bad + done.stderr.splitlines())
        raise Damaged(f"e2fsck of {path} -> {done.returncode}\n{text}")
