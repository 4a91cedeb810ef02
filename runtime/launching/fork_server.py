"""What the fork server imports first: its folder goes when it ends.

The launcher takes the folder away, and the ranks of one that was killed do. But they may end on their own just then;
the server ends after all of them.
"""

from __future__ import annotations

import atexit
import shutil
from multiprocessing import forkserver
from pathlib import Path


def _clear() -> None:
    address = forkserver._forkserver._forkserver_address  # type: ignore[attr-defined]
    if address:
        shutil.rmtree(Path(address).parent, ignore_errors=True)


atexit.register(_clear)
