"""Whether all ranks of a run see the same folders, found out before the first iteration."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plans.errors import RealplanError
from plans.files import writing

PATIENCE_S = 30.0
"""How long a file that one machine has written may take to show on another one, over a network file system."""
RETRY_S = 0.1
_PROBE, _SEEN = "realplan/probe", "realplan/seen"


def check_shared(store: Any, rank: int, world: int, folders: Sequence[Path], patience_s: float = PATIENCE_S) -> None:
    """Raise RealplanError on rank 0 and on every rank that does not see what rank 0 writes into some folders.

    Without this a run whose machines have folders of their own would go on without metrics and without checkpoints:
    what ranks write there is put together by rank 0's process. Collective over all ranks.
    """
    if rank:
        token = store.get(_PROBE).decode()
        missed = next((folder for folder in folders if not _sees(folder / f".{token}", patience_s)), None)
        words = "" if missed is None else _words(rank, missed)
        store.set(f"{_SEEN}/{rank}", f"{words} ")
        if words:
            raise _refused(words)
        return
    token = f"probe-{secrets.token_hex(8)}"
    probes = [folder / f".{token}" for folder in folders]
    try:
        for probe in probes:
            with writing(probe):
                probe.parent.mkdir(parents=True, exist_ok=True)
                probe.touch()
        store.set(_PROBE, token)
        said = [store.get(f"{_SEEN}/{other}").decode().strip() for other in range(1, world)]
    finally:
        for probe in probes:
            probe.unlink(missing_ok=True)
    if blind := next(filter(None, said), ""):
        raise _refused(blind)


def _sees(probe: Path, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        try:
            probe.stat()
            return True
        except OSError:
            time.sleep(RETRY_S)
    return False


def _words(rank: int, folder: Path) -> str:
    return f"rank {rank} on `{socket.gethostname()}` does not see what rank 0 writes to `{folder}`"


def _refused(words: str) -> RealplanError:
    return RealplanError(
        words, "output=FOLDER and checkpoint.folder=FOLDER on a file system that all machines of the run share"
    )
