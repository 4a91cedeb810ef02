"""Chat templates: conversations become the text that a chat model was trained on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from plans.documents import BadText, parse_json, read_text
from plans.errors import RealplanError
from plans.problems import shortened
from runtime.batches.files import DataError

TEMPLATE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
ROLES = ("system", "developer", "user", "assistant", "tool")
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
MOST_TEMPLATE_BYTES = 2**22
ChatMessage = Mapping[str, Any]


class ChatError(RealplanError):
    """A folder without a chat template that works."""


class ChatTemplate:
    """The template of a tokenizer's folder, in a sandbox: it computes text and reaches nothing else.

    switches: further values that it reads, such as `enable_thinking`.
    """

    def __init__(self, text: str, special: Mapping[str, str], switches: Mapping[str, Any], where: str) -> None:
        self._where = where
        self._values = {**special, **switches}
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(text)
        except TemplateError as error:
            line = getattr(error, "lineno", None) or 1
            raise ChatError(f"{where}:{line}:1: the chat template cannot be read: {error}") from None

    @classmethod
    def of_folder(cls, folder: Path, switches: Mapping[str, Any] | None = None) -> ChatTemplate:
        """`chat_template.jinja`, else `chat_template` of `tokenizer_config.json`. Raises ChatError."""
        config: dict[str, Any] = {}
        if os.path.isfile(folder / CONFIG):
            try:
                config = parse_json(read_text(folder / CONFIG, ChatError, "file", "a JSON file", MOST_TEMPLATE_BYTES))
            except BadText as error:
                raise ChatError(f"{folder / CONFIG}: {error.problem.message}", error.hint) from None
        if os.path.isfile(folder / TEMPLATE):
            hint = "a Jinja template"
            text, where = read_text(folder / TEMPLATE, ChatError, "file", hint, MOST_TEMPLATE_BYTES), folder / TEMPLATE
        else:
            text, where = _of_config(config.get("chat_template")), folder / CONFIG
        if not text:
            raise ChatError(
                f"tokenizer `{folder}` has no chat template", f"data.chat=false, or a {TEMPLATE} in the folder"
            )
        special = {name: _token(config.get(name)) for name in SPECIAL}
        return cls(text, {name: token for name, token in special.items() if token}, switches or {}, str(where))

    def render(self, messages: Sequence[ChatMessage], *, generation: bool) -> str:
        """The text of a conversation; with `generation` it ends where the model's answer begins. Raises ChatError."""
        try:
            return self._template.render(messages=messages, add_generation_prompt=generation, **self._values)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise ChatError(f"the chat template of {self._where} refuses it: {shortened(str(error), 200)}") from None

    def begun(self, messages: Sequence[ChatMessage]) -> str:
        """The text of a conversation up to the end of its last message, the beginning of an answer that the model is
        to continue (`continue_final_message` of transformers). Raises ChatError."""
        text, last = self.render(messages, generation=False), str(messages[-1]["content"]).rstrip()
        at = text.rfind(last) if last else -1
        if at < 0:
            raise ChatError(f"the chat template of {self._where} changes the last message, so that it cannot go on")
        return text[: at + len(last)]


def conversation(value: Any) -> list[dict[str, Any]]:
    """Messages of a row. Raises DataError, in words that follow the place, for what is no list of messages."""
    form = '[{"role": "user", "content": "..."}]'
    if not isinstance(value, list) or not value:
        raise DataError(f"it is {shortened(repr(value))}; a conversation is a list of messages", form)
    for number, message in enumerate(value):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in ROLES or not isinstance(content, str):
            shown = shortened(repr(message))
            raise DataError(f"message {number} is {shown}; it needs a role of {', '.join(ROLES)} and a content", form)
    return [dict(message) for message in value]


def _of_config(value: Any) -> str:
    """The template of a config: a text, or the one named `default` of a list."""
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else ""


def _token(value: Any) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
