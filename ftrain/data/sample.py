"""What a row of a data file says, before any tokenizer: texts, chats, preferences, pictures with captions.

A format (`ftrain.data.formats`) makes a sample of a row; a task makes documents of a sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Kind = Literal["text", "image", "audio", "video"]


@dataclass(frozen=True)
class Place:
    """Where a row stands: its file, and its number there, from 1.

    >>> str(Place("chat.jsonl", 7))
    'chat.jsonl, row 7'
    """

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}"


@dataclass(frozen=True)
class Part:
    """A piece of a message: a text, or media whose `source` is a path, the bytes of a file, or a decoded array.
    `sound`: of a film, whose own sound is heard with it.
    """

    kind: Kind
    text: str = ""
    source: Any = None
    sound: bool = False


@dataclass(frozen=True)
class Speech:
    """How a turn of the assistant is spoken.

    Args:
        source: codes of its frames, `[frames, codes]`, or a file of them (.npy); of a recording a path, bytes or array.
        recorded: it is a recording, of which codes are to be made.
        voice: the name of the speaker, or its id; None: the only one.
    """

    source: Any
    recorded: bool = False
    voice: str | int | None = None


@dataclass(frozen=True)
class Message:
    """One turn of a chat.

    Args:
        role: "system", "user", "assistant", "tool", or what the chat template of the model knows.
        parts: texts and media, in reading order.
        train: whether its tokens are labels; None leaves that to the task (turns of the assistant are).
        extra: further fields that the chat template may read: tool_calls, name, reasoning_content.
        speech: how it is spoken, if it is.
    """

    role: str
    parts: tuple[Part, ...]
    train: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    speech: Speech | None = None

    @property
    def text(self) -> str:
        """The texts of its parts, joined."""
        return "".join(part.text for part in self.parts if part.kind == "text")

    @property
    def media(self) -> tuple[Part, ...]:
        """The parts that are no text."""
        return tuple(part for part in self.parts if part.kind != "text")


def say(role: str, text: str, *, train: bool | None = None) -> Message:
    """A message of one text.

    >>> say("user", "2 + 2?").text
    '2 + 2?'
    """
    return Message(role, (Part("text", text),), train)


@dataclass(frozen=True)
class Prose:
    """A text of which every token is trained on."""

    text: str
    place: Place = field(kw_only=True)


@dataclass(frozen=True)
class Chat:
    """A conversation, and the tools that it may call (as JSON schemas of functions)."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    place: Place = field(kw_only=True)


@dataclass(frozen=True)
class Preference:
    """Two ends of one conversation, of which the first is the better."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    place: Place = field(kw_only=True)


@dataclass(frozen=True)
class Judged:
    """An end of a conversation, and whether it is good."""

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    good: bool
    place: Place = field(kw_only=True)


@dataclass(frozen=True)
class Tokens:
    """Token ids `[n]` made beforehand.

    `labels` `[n]`: as the files of others have them, not shifted: the id at a place that is trained on, -100 elsewhere.
    None: every token is trained on.
    """

    ids: Sequence[int] | np.ndarray
    labels: Sequence[int] | np.ndarray | None = None
    place: Place = field(kw_only=True)


@dataclass(frozen=True)
class Captioned:
    """A picture, a recording or a film, and what is said of it."""

    media: Part
    text: str
    place: Place = field(kw_only=True)


@dataclass(frozen=True)
class Pair:
    """A question, a text that answers it, and texts that do not: for embeddings."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    place: Place = field(kw_only=True)


@dataclass(frozen=True)
class Classed:
    """A text, and the number of its class."""

    text: str
    label: int
    place: Place = field(kw_only=True)


Sample = Prose | Chat | Preference | Judged | Tokens | Captioned | Pair | Classed
