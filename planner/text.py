"""The width of what commands print, and lines that keep to it."""

from __future__ import annotations

import textwrap

PROSE_WIDTH = 80


def wrapped(text: str, indent: str = "  ") -> list[str]:
    """The lines of a text, at most `PROSE_WIDTH` wide; those after the first begin with `indent`. Words stay whole."""
    return textwrap.wrap(text, PROSE_WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
