"""A volume's image judged on the host, as if somebody went on with this copy alone.

Needs no root: e2fsck and debugfs work on files. Used by ``pair``.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.faults.blocktrace import copy
from tests.guest.cuts.fsck import ENVIRONMENT, check_ext4
from tests.guest.cuts.load import Found, judge


def judge_image(image: Path) -> Found:
    """What an ext4 holds once its journal is replayed; Damaged if it is, Wrong if it holds what the
    load cannot have led to. The image is left as it is."""
    work, files = image.with_suffix(".work"), image.with_suffix(".files")
    copy(image, work)
    shutil.rmtree(files, ignore_errors=True)
    files.mkdir()
    try:
        check_ext4(str(work))
        extract = ["debugfs", "-R", f"rdump / {files}", str(work)]
        subprocess.run(extract, check=True, capture_output=True, env=ENVIRONMENT)
        return judge(files)
    finally:
        shutil.rmtree(files, ignore_errors=True)
        work.unlink(missing_ok=True)
