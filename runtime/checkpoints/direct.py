"""Files that are written past the page cache, where the file system lets one.

A checkpoint is larger than what the cache should hold for it: through the cache, its pages are allocated, copied and
cleared away by the cores that train, at several times the cost of handing the memory to the disk itself.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from contextlib import suppress
from io import FileIO
from pathlib import Path

_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux alone has it


def open_direct(path: Path) -> FileIO:
    """A new file for `write_block`, in place of one that is there. Raises OSError."""
    return FileIO(path, "wb", opener=_opened)


def _opened(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def write_block(file: FileIO, block: memoryview) -> None:
    """Append a block, which begins with a page of memory and, but for the last one, ends with one. Raises OSError."""
    while block:
        if len(block) % mmap.PAGESIZE:  # the last one, or what a full disk has left of one
            _through_cache(file)
        try:
            block = block[file.write(block) :]
        except OSError as error:
            if error.errno != errno.EINVAL or not _through_cache(file):
                raise


def _through_cache(file: FileIO) -> bool:
    """Whether the file was written past the cache till now."""
    flags = fcntl.fcntl(file.fileno(), fcntl.F_GETFL)
    fcntl.fcntl(file.fileno(), fcntl.F_SETFL, flags & ~_DIRECT)
    return bool(flags & _DIRECT)


def large_pages(size: int) -> mmap.mmap:
    """Fresh memory in large pages, where the kernel has some: they are cleared at a quarter of the cost of small ones,
    and as a disk is told where each run of memory lies, it takes a block of them in far fewer requests (465 MiB/s where
    small pages had 160)."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
