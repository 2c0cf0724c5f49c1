"""Messages as a prompt, by the model's own chat template.

Templates are programs that come with a model, so they run in Jinja's sandbox, with what Hugging
Face's own renderer gives them: trimmed blocks, loop controls, `raise_exception`, `tojson`,
`strftime_now`.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from coordinator.gateway.openai_requests import Message, WrongField
from longreach.errors import FailedPrecondition

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class ChatTemplate:
    """A template and the special tokens that it may name."""

    def __init__(self, text: str, special: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise, strftime_now=_strftime_now)
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as problem:
            raise FailedPrecondition(
                f"the chat template cannot be read ({problem}); set chat_template to another",
                reason="BAD_CHAT_TEMPLATE",
            ) from None
        self._special = special

    @classmethod
    def load(cls, source: str, override: str = "") -> ChatTemplate:
        """The template of a model folder or hub name; `override` is a file that is taken instead.

        Raises FailedPrecondition where there is none. Blocks: call it on a thread.
        """
        config = json.loads(_read(source, "tokenizer_config.json") or "{}")
        special = {name: _text(config[name]) for name in _SPECIAL if config.get(name)}
        if override:
            try:
                return cls(Path(override).read_text(), special)
            except OSError as problem:
                raise FailedPrecondition(
                    f"chat_template {override!r} cannot be read: {problem}",
                    reason="NO_CHAT_TEMPLATE",
                ) from None
        text = _read(source, "chat_template.jinja") or _default(config.get("chat_template"))
        if not text:
            raise FailedPrecondition(
                f"{source} brings no chat template; use /v1/completions, or give the coordinator "
                "one by chat_template",
                reason="NO_CHAT_TEMPLATE",
            )
        return cls(text, special)

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt, up to where the assistant's answer begins. Raises WrongField where the
        template refuses the messages."""
        objects = [
            {"role": each.role, "content": each.content}
            | ({"name": each.name} if each.name else {})
            for each in messages
        ]
        try:
            return self._template.render(
                messages=objects, add_generation_prompt=True, tools=None, **self._special
            )
        except (jinja2.TemplateError, TypeError) as problem:
            raise WrongField("messages", f"the model's chat template refuses: {problem}") from None


def _read(source: str, name: str) -> str:
    """A file of a model; empty where there is none."""
    folder = Path(source)
    if folder.is_dir():
        path = folder / name
        return path.read_text() if path.exists() else ""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, name)).read_text()
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        return ""


def _default(entry: Any) -> str:
    """`chat_template` of tokenizer_config.json: a text, or a list of named ones."""
    if isinstance(entry, list):
        named = {each["name"]: each["template"] for each in entry}
        return str(named.get("default", ""))
    return str(entry or "")


def _text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, indent: int | None = None) -> str:
    """Without the HTML escapes of Jinja's own."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
