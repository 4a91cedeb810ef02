"""What the ranks of a machine leave word of, on its way to the first machine, which reads it as if all were there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from runtime.machines.wire import Message

_TOLD = re.compile(r"(status|records|error|crash)-\d{1,9}(\.jsonl|\.json)?")
_GROWS = re.compile(r"records-\d{1,9}\.jsonl")
MOST_BYTES = 2**24


class Mirror:
    """Tells the changes of a folder since it was last asked: the new bytes of files that grow, others whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, tuple[int, int]] = {}

    def changes(self) -> Iterator[Message]:
        """A message for every file that has changed."""
        for path in sorted(self._folder.iterdir()):
            if not _TOLD.fullmatch(path.name):
                continue
            found, (read, changed) = path.stat(), self._seen.get(path.name, (0, 0))
            if (read, changed) == (found.st_size, found.st_mtime_ns):
                continue
            start = read if _GROWS.fullmatch(path.name) else 0
            with path.open("rb") as file:
                file.seek(start)
                content = file.read(MOST_BYTES)
            self._seen[path.name] = (start + len(content), found.st_mtime_ns)
            yield {"name": path.name, "at": start, "text": content.decode("utf-8", "surrogateescape")}


def apply(folder: Path, message: Message) -> None:
    """Put a change into a folder. Raises ValueError for a name that no rank has."""
    name = str(message["name"])
    if not _TOLD.fullmatch(name):
        raise ValueError(f"`{name[:80]}` is no file of a rank")
    content = str(message["text"]).encode("utf-8", "surrogateescape")
    if _GROWS.fullmatch(name):
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.seek(int(message["at"]))
            file.write(content)
        return
    partial = folder / f".{name}"
    partial.write_bytes(content)
    os.replace(partial, folder / name)
