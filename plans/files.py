"""Files written whole or not at all, never over what is no regular file, and never over what somebody still needs."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from plans.errors import RealplanError

_HINTS = {
    errno.ENOSPC: "free some space there, or write to another disk",
    errno.EDQUOT: "your quota there is used up: write to another disk",
    errno.EACCES: "you may not write there: name another place",
    errno.EPERM: "you may not write there: name another place",
    errno.EROFS: "that disk is read-only: name another place",
    errno.ENAMETOOLONG: "a shorter name",
    errno.ENOTDIR: "a file stands where a folder should: name another place",
    errno.ELOOP: "links there lead in a circle",
}


class OutputError(RealplanError):
    """A file that cannot be written; the message has the path and the system's reason."""


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text beside `path` and rename it into place: a reader never sees half a file, and a failure leaves
    the old file and nothing else.

    A link is followed, a device or pipe (`/dev/stdout`) is written to and not replaced. Folders are made. A file that
    exists keeps its mode, a new one has the usual one. Raises OutputError.
    """
    try:
        target, kind = _target(path)
        # A lone surrogate, which only a broken file name brings, must not lose the rest.
        content = text.encode("utf-8", "backslashreplace")
        if kind is not None and not stat.S_ISREG(kind):
            _write_all(os.open(target, os.O_WRONLY), content)
            return
        _ancestor(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(target, content, None if kind is None else stat.S_IMODE(kind))
    except OSError as error:
        raise _refused(path, error) from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name what was to be written when the system refuses: OSError becomes OutputError."""
    try:
        yield
    except OSError as error:
        raise _refused(path, error) from None


def check_target(path: Path) -> None:
    """Raise OutputError where `write_atomically` would: ask before work whose result goes to `path`."""
    try:
        target, kind = _target(path)
        if kind is not None and not stat.S_ISREG(kind):
            return
        trial = _beside(_ancestor(target) / target.name)
        os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        trial.unlink()
    except OSError as error:
        raise _refused(path, error) from None


def free_name(path: Path) -> Path:
    """The first of `NAME.1`, `NAME.2`, ... that nothing has taken."""
    number = 1
    while os.path.lexists(path.with_name(f"{path.name}.{number}")):
        number += 1
    return path.with_name(f"{path.name}.{number}")


def _target(path: Path) -> tuple[Path, int | None]:
    """Where links lead, and the mode of what is there (None: nothing). Raises OutputError for what nobody writes to."""
    target = Path(os.path.realpath(path))
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return target, None
    if stat.S_ISDIR(mode):
        raise OutputError(f"cannot write `{path}`: it is a folder", f"a file in it, such as `{path / 'plan.json'}`")
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        raise OutputError(f"cannot write `{path}`: it is no regular file", "name another file")
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    # `/dev/stdout` leads to names such as `pipe:[123]`, which only the link itself can open.
    return (target if stat.S_ISREG(mode) else path), mode


def _ancestor(target: Path) -> Path:
    """The nearest folder above that exists. Raises OSError where a folder cannot be made below it."""
    folder = target.parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    longest = os.pathconf(folder, "PC_NAME_MAX")
    if any(len(os.fsencode(part)) > longest for part in target.parts[len(folder.parts) :]):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    return folder


def _beside(target: Path) -> Path:
    return target.with_name(
        f".{secrets.token_hex(8)}.partial"
    )  # no part of the name, which may be as long as it can be


def _replace(target: Path, content: bytes, mode: int | None) -> None:
    partial = _beside(target)
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # less the umask
        _write_all(descriptor, content)
        if mode is not None:
            os.chmod(partial, mode)
        os.replace(partial, target)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def _write_all(descriptor: int, content: bytes) -> None:
    with open(descriptor, "wb") as file:
        file.write(content)


def _refused(path: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(f"cannot write `{path}`: {reason}", _HINTS.get(error.errno or 0, "name another file"))
