"""``python -m nbdmirror`` is the ``nbdmirror`` command."""

from __future__ import annotations

import sys

from nbdmirror.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
