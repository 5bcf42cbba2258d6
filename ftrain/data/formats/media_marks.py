"""Marks of media within texts, as LLaVA and ms-swift have them: <image> stands for the next file of a list."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ftrain.data.formats.fields import Fields
from ftrain.data.formats.messages import media_source
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Kind, Message, Part, Place

_KINDS: tuple[Kind, ...] = ("image", "audio", "video")
_MARK = re.compile(r"<(image|audio|video)>")


def media_lists(fields: Fields, place: Place) -> dict[Kind, list[Any]]:
    """The files of a row by kind: of "image" or "images" and so on, one or a list. BadRow where one is null."""
    found: dict[Kind, list[Any]] = {}
    for kind in _KINDS:
        for name in (kind, f"{kind}s"):
            value = fields.get(name)
            if value is None:
                continue
            many = value if isinstance(value, list | tuple) else [value]
            sources = [media_source({kind: one}, kind) for one in many]
            if any(source is None for source in sources):
                raise BadRow(place, "media missing", f"{name!r} holds null")
            found.setdefault(kind, []).extend(sources)
    return found


def has_media(fields: Fields) -> bool:
    """Whether a row has a field for files of media."""
    return any(name in fields for kind in _KINDS for name in (kind, f"{kind}s"))


def with_marks(messages: tuple[Message, ...], files: Mapping[Kind, Sequence[Any]], place: Place) -> tuple[Message, ...]:
    """The messages with a part of media for each mark; files without any mark in the chat stand before its first user
    turn. BadRow where there are more marks than files, or files are left.
    """
    rest = {kind: list(sources) for kind, sources in files.items()}
    marked = {found for message in messages for found in _MARK.findall(message.text)}
    before = [Part(kind, source=s) for kind, sources in rest.items() if kind not in marked for s in sources]
    for kind in list(rest):
        if kind not in marked:
            rest[kind] = []
    made = [
        Message(m.role, tuple(p for part in m.parts for p in _split(part, rest, place)), m.train, m.extra)
        for m in messages
    ]
    left = {kind: len(sources) for kind, sources in rest.items() if sources}
    if left:
        raise BadRow(place, "marks and media differ", f"files that no mark stands for: {left}")
    return _placed_before(tuple(made), before, place)


def _placed_before(messages: tuple[Message, ...], media: Sequence[Part], place: Place) -> tuple[Message, ...]:
    if not media:
        return messages
    for i, message in enumerate(messages):
        if message.role == "user":
            first = Message(message.role, (*media, *message.parts), message.train, message.extra)
            return (*messages[:i], first, *messages[i + 1 :])
    raise BadRow(place, "marks and media differ", f"{len(media)} files, and no turn of the user to see them")


def _split(part: Part, rest: dict[Kind, list[Any]], place: Place) -> list[Part]:
    if part.kind != "text" or not rest:
        return [part]
    parts: list[Part] = []
    at = 0
    for mark in _MARK.finditer(part.text):
        kind: Kind = next(k for k in _KINDS if k == mark.group(1))
        if kind not in rest:
            continue  # a word of the text
        if not rest[kind]:
            raise BadRow(place, "marks and media differ", f"more marks <{kind}> than files")
        parts += [Part("text", part.text[at : mark.start()]), Part(kind, source=rest[kind].pop(0))]
        at = mark.end()
    parts.append(Part("text", part.text[at:]))
    return [p for p in parts if p.kind != "text" or p.text] or [part]
