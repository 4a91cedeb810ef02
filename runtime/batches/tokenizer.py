"""Tokenizer of a Hugging Face folder: text to ids and back, and the special ids that generation needs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from plans.documents import BadText, locate, parse_json, read_text, refuse
from plans.errors import RealplanError
from plans.problems import Problem, shortened

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")
"""Of a folder, that `Tokenizer.of_folder` reads."""
MOST_TOKENIZER_BYTES = 2**28
LARGEST_ID = 2**31
UNUSUAL = "a \ue000 qzxqzx0"
_AT = re.compile(r" at line (\d+) column (\d+)")  # how the library's JSON reader ends its messages


class TokenizerError(RealplanError):
    """A folder whose tokenizer cannot be used."""


class Tokenizer:
    """`tokenizer.json` with the ids that stop and pad: `eos_ids` (may be empty) and `pad_id`."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_ids: tuple[int, ...], pad_id: int) -> None:
        self._backend = backend
        self.eos_ids = eos_ids
        self.pad_id = pad_id

    @classmethod
    def of_folder(cls, folder: str | Path) -> Tokenizer:
        """Read `tokenizer.json`; stop ids from generation_config.json, else config.json, else tokenizer_config.json."""
        path = Path(folder) / "tokenizer.json"
        if not os.path.isfile(path):
            raise TokenizerError(
                f"{path}: no such file", "a Hugging Face folder with a fast tokenizer (tokenizer.json)"
            )
        backend = _backend(path)
        backend.no_padding()
        backend.no_truncation()
        configs = [_read_json(path.with_name(name)) for name in ("generation_config.json", "config.json")]
        tokens = _read_json(path.with_name("tokenizer_config.json"))
        eos = _first_ids(configs, "eos_token_id") or _token_ids(backend, tokens.keys.get("eos_token"))
        pad = _token_ids(backend, tokens.keys.get("pad_token")) or _first_ids(configs, "pad_token_id") or eos or (0,)
        return cls(backend, eos, pad[0])

    @property
    def size(self) -> int:
        """One more than the largest id, added tokens included."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with the special tokens that the tokenizer itself adds (Llama's begin-of-text)."""
        with _named("encode"):
            return self._once(self._backend.encode(text).ids)

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Ids of several texts, with or without the special tokens of `encode`."""
        with _named("encode"):
            encoded = self._backend.encode_batch(list(texts), add_special_tokens=special)
            return [self._once(encoding.ids) if special else encoding.ids for encoding in encoded]

    def _once(self, ids: list[int]) -> list[int]:
        """Ids without the begin-of-text that the tokenizer adds before one that the text already has."""
        first = self._begin
        return ids[len(first) :] if first and ids[: 2 * len(first)] == [*first, *first] else ids

    @cached_property
    def _begin(self) -> list[int]:
        """What the tokenizer adds before every text."""
        bare, added = self._backend.encode("a", add_special_tokens=False).ids, self._backend.encode("a").ids
        return next((added[:i] for i in range(len(added)) if added[i : i + len(bare)] == bare), [])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        with _named("decode"):
            return self._backend.decode(list(ids), skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` so that the folder reads back as this tokenizer."""
        folder = Path(folder)
        self._backend.save(str(folder / "tokenizer.json"))
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": self._token(self.pad_id)}
        if self.eos_ids:
            config["eos_token"] = self._token(self.eos_ids[0])
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _token(self, token_id: int) -> str:
        return str(self._backend.id_to_token(token_id))


@contextmanager
def _named(what: str) -> Iterator[None]:
    """The library's errors, which have no type of their own, as TokenizerError."""
    try:
        yield
    except Exception as error:
        reason = shortened(error, 200)
        raise TokenizerError(f"the tokenizer cannot {what} a text: {reason}", "another tokenizer=FOLDER") from None


def _backend(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a file; raises TokenizerError, located, for one that is none."""
    hint = "a tokenizer.json as `tokenizers` saves it"
    config = _read_json(path)
    try:
        found = tokenizers.Tokenizer.from_str(config.text)
        found.encode(UNUSUAL)  # what has no token for unknown words says so only here
        return found
    except BaseException as error:  # the library raises no type of its own, and panics are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        at = _AT.search(str(error))
        line, column = (int(at[1]), int(at[2]) or 1) if at else (1, 1)
        reason = shortened(_AT.sub("", str(error)), 200)
        raise TokenizerError(f"{path}:{line}:{column}: no tokenizer: {reason}", hint) from None


@dataclass(frozen=True)
class _Config:
    """A JSON file of the folder: its text, empty where there is none, and its keys."""

    path: Path
    text: str = ""
    keys: Mapping[str, Any] = field(default_factory=dict)


def _read_json(path: Path) -> _Config:
    if not os.path.isfile(path):
        return _Config(path)
    text = read_text(path, TokenizerError, "file", "a JSON file", MOST_TOKENIZER_BYTES)
    try:
        content = parse_json(text)
    except BadText as error:
        refuse(TokenizerError, path, [error.problem])
    if not isinstance(content, dict):
        refuse(TokenizerError, path, [Problem("value", "the file holds one object", "{...}", (), 1, 1)])
    return _Config(path, text, content)


def _first_ids(configs: Sequence[_Config], key: str) -> tuple[int, ...]:
    """The first value of `key` among the configs that names ids: one, or a list; -1 means none."""
    for config in configs:
        value = config.keys.get(key)
        found = value if isinstance(value, list) else [value]
        ids = tuple(i for i in found if i is not None and i != -1)
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < LARGEST_ID for i in ids):
            message = f"{key} is {shortened(value)}; it must be an id, or a list of ids"
            problem = Problem("value", message, f'"{key}": 2', (key,))
            refuse(TokenizerError, config.path, locate(config.text, [problem]))
        if ids:
            return ids
    return ()


def _token_ids(backend: tokenizers.Tokenizer, token: Any) -> tuple[int, ...]:
    """The id of a token that tokenizer_config.json gives as text or as {"content": text}."""
    text = token.get("content") if isinstance(token, dict) else token
    try:
        found = backend.token_to_id(text) if isinstance(text, str) else None
    except UnicodeEncodeError:  # half of a surrogate pair, which no vocabulary has
        found = None
    return () if found is None else (found,)
