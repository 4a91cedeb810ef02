"""The width of what commands print, and lines that keep to it."""

from __future__ import annotations

import textwrap

WIDTH = 80


def wrapped(text: str, indent: str = "  ") -> list[str]:
    """The lines of a text of at most `WIDTH` columns; those after the first begin with `indent`. Words stay whole."""
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
