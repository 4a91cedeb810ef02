"""What commands print: names come from files, and files from elsewhere, so a terminal shows them and obeys nothing."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO, cast


def printable(text: str) -> str:
    """Text with its control characters spelled out, but for line breaks and tabs. Names of files that the locale could
    not read are read as UTF-8."""
    if not text.isascii():
        with suppress(UnicodeError):
            text = text.encode("utf-8", "surrogateescape").decode("utf-8")
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Plain(io.TextIOBase):
    """A stream that writes what is printable. It has no `buffer`, by which libraries would get past it."""

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream  # rich looks here, to draw bars and colours
        if isinstance(stream, io.TextIOWrapper):  # a terminal without UTF-8 shows an escape and no traceback
            stream.reconfigure(errors="backslashreplace")

    @property
    def encoding(self) -> str:  # type: ignore[override] # mypy's stub has an attribute
        """That of the stream."""
        return self.rich_proxied_file.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        """What becomes of characters that the encoding lacks."""
        return self.rich_proxied_file.errors

    def write(self, text: str) -> int:
        """Write a text; bytes raise, by which click tells the kind of a stream."""
        if not isinstance(text, str):
            raise TypeError(f"a text is needed, not {type(text).__name__}")
        self.rich_proxied_file.write(printable(text))
        return len(text)

    def flush(self) -> None:
        """Write what is held back."""
        self.rich_proxied_file.flush()

    def isatty(self) -> bool:
        """Whether a person looks."""
        return self.rich_proxied_file.isatty()

    def fileno(self) -> int:
        """The descriptor."""
        return self.rich_proxied_file.fileno()

    def writable(self) -> bool:
        """Always."""
        return True


@contextmanager
def plain_streams() -> Iterator[None]:
    """Make stdout and stderr plain."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, Plain(stream)) if stream else stream for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
