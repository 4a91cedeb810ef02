"""Faults that people and networks put into files: values, keys, lines, characters, bytes, cuts and repetitions."""

from __future__ import annotations

import random
import re

ODD_VALUES = (
    "null", "true", "[]", "{}", '""', '"x"', "0", "-1", "010", "0x10", "1_000", "1.5", "1e400", "-1e400", "NaN",
    "Infinity", ".inf", ".nan", "1e-320", "9" * 25, "9" * 5000, "2020-01-01", '"' + "y" * 300 + '"', "yes", "*a",
    "&a [*a]", "!!int x", "[" * 80 + "]" * 80, '{"a": 1, "a": 2}', '"\\ud83d"', "1:30", '"\\u001b[31m"', "1e308",
    "-0.0", "[1, [2]]",
)  # fmt: skip
ODD_TEXT = (
    "\x00", "\x1b[31m", "\t", "\r", "\ufeff", "\u2028", "'", '"', "{", "}", "[", "]", ":", ",", "#", "//", "/*", "\\",
    "²", "1",
)  # fmt: skip
ODD_BYTES = (b"\xff", b"\xe9", b"\x00", b"\xef\xbb\xbf", b"\xed\xa0\xbd")
ODD_WORDS = (
    "", " ", "-1", "0", "nan", "inf", "1e400", "1e308", "9" * 25, "9" * 5000, "٣", "x", "y" * 300, "\x1b[31m", "a=b",
    "-", "--", "/dev/null", "/dev/zero", "/", ".", "nowhere/x", "é", "\udcff", "1.5", "010", "1_0", "true", "4,4", "\n",
    "²", "x\x00y",
)  # fmt: skip
SCALAR = re.compile(r'(?<=[:,\[ ])\s*("(?:[^"\\\n]|\\.)*"|[\w.+-]+)(?=\s*[,}\]\n])')
KEY = re.compile(r'"?([A-Za-z_]\w+)"?(?=\s*:)')


def broken(text: str, rng: random.Random) -> bytes:
    """A text with one to three faults."""
    for _ in range(rng.randint(1, 3)):
        fault = rng.randrange(8)
        if fault == 7:
            data, at = text.encode("utf-8", "surrogatepass"), rng.randrange(len(text) + 1)
            return data[:at] + rng.choice(ODD_BYTES) + data[at:]
        text = _broken_once(text, fault, rng)
    return text.encode("utf-8", "surrogatepass")


def _broken_once(text: str, fault: int, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    if fault <= 2:
        return _replaced(text, _near(SCALAR, text, rng), rng.choice(ODD_VALUES))
    if fault == 3:
        found = _near(KEY, text, rng)
        word = found[1] if found else ""
        return _replaced(text, found, rng.choice((word + "s", word[:-1], "x" * 90, "")))
    if fault == 4:
        lines = text.splitlines(keepends=True)
        i = rng.randrange(len(lines)) if lines else 0
        return "".join(lines[:i] + lines[i : i + 1] * rng.choice((0, 2)) + lines[i + 1 :])
    if fault == 5:
        return text[:at] + rng.choice(ODD_TEXT) + text[at:]
    return text[:at] if rng.random() < 0.5 else text[:at] + text[at + rng.randint(1, 20) :]


def _near(pattern: re.Pattern[str], text: str, rng: random.Random) -> re.Match[str] | None:
    """A match of a pattern somewhere in a text; the text may be long, so that not all are looked for."""
    return pattern.search(text, rng.randrange(len(text) + 1)) or pattern.search(text)


def _replaced(text: str, found: re.Match[str] | None, word: str) -> str:
    return text if found is None else text[: found.start(1)] + word + text[found.end(1) :]


def broken_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with faults in its header, whose length is mended, or anywhere in its bytes."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.3:
        at = rng.randrange(min(len(data), size + 100))
        return rng.choice((data[:at], data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :], data + b"x"))
    header = broken(data[8 : 8 + size].decode(), rng)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def broken_words(words: list[str], rng: random.Random) -> list[str]:
    """A command line with one or two faults: values, names of options, words left out or twice."""
    words = list(words)
    for _ in range(rng.randint(1, 2)):
        if not words:
            break
        at = rng.randrange(1, len(words)) if len(words) > 1 else 0
        kind = rng.randrange(5)
        if kind <= 2:
            options = [i for i in range(1, len(words)) if not words[i].startswith("-")]
            words[rng.choice(options) if options else at] = rng.choice(ODD_WORDS)
        elif kind == 3:
            words[at] = rng.choice((words[at][:-1], words[at] + "s", words[at].upper()))
        else:
            words[at : at + 1] = [words[at]] * rng.choice((0, 2))
    return words
