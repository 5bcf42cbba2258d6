"""The chat template of a model's folder: chats as the text that the model was trained to see.

Templates are transformers'. They run in its sandbox, without the network.
"""

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

try:
    from jinja2 import TemplateError
    from transformers import AutoTokenizer
    from transformers.utils.chat_template_utils import render_jinja_template
except ImportError as absent:
    raise ValueError('tokenizers and chat templates need transformers: pip install "ftrain-omni[train]"') from absent

from ftrain.data.sample import Message, Part

_MARKS = "{%- generation", "{% generation", "{%-generation", "{%generation"


def load_tokenizer(folder: str | PathLike[str]) -> Any:
    """The tokenizer of a model's folder, with its chat template. Nothing is fetched, and no code of the folder runs.

    ValueError where the folder holds no tokenizer, or one that cannot tell which characters a token spells.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: there is no such folder of a model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{folder} holds no tokenizer that can be read: {error}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{folder} has a slow tokenizer, which tells no places of tokens: it needs tokenizer.json")
    beside = Path(folder) / "chat_template.json"  # processors of older models
    if tokenizer.chat_template is None and beside.is_file():
        tokenizer.chat_template = _template_of(beside)
    return tokenizer


def _template_of(file: Path) -> str | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    template = found.get("chat_template") if isinstance(found, dict) else None
    return template if isinstance(template, str) else None


class ChatTemplate:
    """The template of a tokenizer, or another one, with options that it knows, such as enable_thinking.

    ValueError where the tokenizer has none and none is given.
    """

    def __init__(
        self, tokenizer: Any, *, template: str | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        if template is None and not tokenizer.chat_template:
            raise ValueError(
                f"the model's folder ({tokenizer.name_or_path or 'of the tokenizer'}) has no chat template: it is no "
                "chat model; give a template, or train on plain texts"
            )
        self._tokenizer, self._template = tokenizer, template
        self._given = {**tokenizer.special_tokens_map, **(options or {})}
        self._sources: dict[bool, str] = {}

    def source(self, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text of the template; some have another one for chats with tools."""
        if bool(tools) not in self._sources:
            found = self._tokenizer.get_chat_template(self._template, tools=list(tools) or None)
            self._sources[bool(tools)] = found
        return self._sources[bool(tools)]

    def has_marks(self, tools: Sequence[Mapping[str, Any]] = ()) -> bool:
        """Whether it marks what the model writes, by {% generation %}."""
        return any(mark in self.source(tools) for mark in _MARKS)

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), *, prompt: bool = False
    ) -> str:
        """The text of a chat; with `prompt` up to where the assistant begins to speak.

        `messages` are those of `as_fields`. ValueError where the template refuses them.
        """
        return self._render(messages, tools, prompt, False)[0]

    def render_marked(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a chat, and the characters [start, end) that the template marks by {% generation %}.

        ValueError where the template refuses the chat.
        """
        return self._render(messages, tools, False, True)

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], prompt: bool, marked: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            rendered: Any = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self.source(tools),
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                **self._given,
            )
        except (TemplateError, TypeError, KeyError, AttributeError, IndexError, ValueError) as error:
            raise ValueError(f"the chat template refuses it: {error or type(error).__name__}") from error
        texts, marks = rendered
        return texts[0], [(int(start), int(end)) for start, end in marks[0]] if marked else []


def as_fields(messages: Sequence[Message], *, parts: bool = False) -> list[dict[str, Any]]:
    """Messages as templates read them: "content" is a text, or a list of parts where any message of the chat has media.

    `parts`: always a list, which templates of models with media need.
    """
    parts = parts or any(message.media for message in messages)
    return [{"role": m.role, "content": _parts(m.parts) if parts else m.text, **m.extra} for m in messages]


def _parts(parts: Sequence[Part]) -> list[dict[str, str]]:
    return [{"type": "text", "text": part.text} if part.kind == "text" else {"type": part.kind} for part in parts]
