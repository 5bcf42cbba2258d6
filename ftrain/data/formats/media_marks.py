"""Files of media that a row names beside its texts: marks such as <image>, and parts without a source, stand for them.

LLaVA, ms-swift, LLaMA-Factory and TRL have rows of this kind, of every format of chats.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ftrain.data.formats.fields import Fields
from ftrain.data.formats.messages import media_source
from ftrain.data.formats.plain import media_field
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Captioned, Chat, Judged, Kind, Message, Part, Place, Preference, Sample

_KINDS: tuple[Kind, ...] = ("image", "audio", "video")
_MARK = re.compile(r"<(image|audio|video)>")
_DIFFER = "marks and media differ"


def with_files(sample: Sample, fields: Fields, place: Place, *, marked: bool = False) -> Sample:
    """The sample with the files of its row's "image", "images" and so on, in the places that stand for them.

    `marked`: the mark <image> stands for a file in rows without any too; else it is a word there.

    Of preferences and judged answers these places are in the prompt. BadRow where files and places differ in number,
    a part of media has no source, or the row is of texts, ids or classes, which have no places.
    """
    files = {kind: sources for kind, sources in media_lists(fields, place).items() if sources}
    if marked:
        files.setdefault("image", [])
    if isinstance(sample, Chat):
        return replace(sample, messages=with_marks(sample.messages, files, place))
    if isinstance(sample, Preference):
        chosen, rejected = (with_marks(end, {}, place) for end in (sample.chosen, sample.rejected))
        return replace(sample, prompt=with_marks(sample.prompt, files, place), chosen=chosen, rejected=rejected)
    if isinstance(sample, Judged):
        prompt, completion = with_marks(sample.prompt, files, place), with_marks(sample.completion, {}, place)
        return replace(sample, prompt=prompt, completion=completion)
    count = sum(map(len, files.values()))
    own = media_field(fields) if isinstance(sample, Captioned) else None
    if count > int(own is not None and own[0] in _KINDS):
        detail = (
            f"{count} files ({_told(files)}), of which a {type(sample).__name__.lower()} row has no use: write a chat"
        )
        raise BadRow(place, _DIFFER, detail)
    return sample


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
    """The messages with a part of media for each mark, and a source for each part without one; files for which nothing
    stands in the chat stand before its first user turn, unless its parts name them themselves.

    BadRow where there are more places than files, or files are left.
    """
    rest = {kind: list(sources) for kind, sources in files.items()}
    before: list[Part] = []
    for kind, sources in files.items():
        if not sources or _stands_for(messages, kind):
            continue
        rest[kind] = []
        named = [part.source for message in messages for part in message.media if part.kind == kind]
        if not named:
            before += [Part(kind, source=source) for source in sources]
        elif not _equal(named, sources):
            detail = f"{len(sources)} files, and {len(named)} others that parts of the messages name by themselves"
            raise BadRow(place, _DIFFER, detail)
    made = [
        replace(m, parts=tuple(p for part in m.parts for p in _filled(part, rest, i + 1, place)))
        for i, m in enumerate(messages)
    ]
    left = {kind: sources for kind, sources in rest.items() if sources}
    if left:
        raise BadRow(place, _DIFFER, f"files that no mark stands for: {_told(left)}")
    return _placed_before(tuple(made), before, place)


def _told(files: Mapping[Kind, Sequence[Any]]) -> str:
    return ", ".join(f"{len(sources)} x {kind}" for kind, sources in files.items())


def _stands_for(messages: Sequence[Message], kind: Kind) -> bool:
    """Whether a mark, or a part without a source, stands for files of this kind."""
    marked = any(kind in _MARK.findall(message.text) for message in messages)
    return marked or any(part.kind == kind and part.source is None for message in messages for part in message.media)


def _equal(named: Sequence[Any], sources: Sequence[Any]) -> bool:
    """Whether parts name just these files: paths or bytes, in this order."""
    plain = all(isinstance(one, str | bytes) for one in (*named, *sources))
    return plain and list(named) == list(sources)


def _placed_before(messages: tuple[Message, ...], media: Sequence[Part], place: Place) -> tuple[Message, ...]:
    if not media:
        return messages
    for i, message in enumerate(messages):
        if message.role == "user":
            first = replace(message, parts=(*media, *message.parts))
            return (*messages[:i], first, *messages[i + 1 :])
    raise BadRow(place, _DIFFER, f"{len(media)} files, and no turn of the user to see them")


def _filled(part: Part, rest: dict[Kind, list[Any]], number: int, place: Place) -> list[Part]:
    if part.kind == "text":
        return _split(part, rest, place) if rest else [part]
    if part.source is not None:
        return [part]
    if rest.get(part.kind):
        return [replace(part, source=rest[part.kind].pop(0))]
    if part.kind in rest:
        raise BadRow(place, _DIFFER, f"more places of the kind {part.kind} than files")
    detail = (
        f"a part of message {number} is {part.kind!r}, without a path, bytes or URL, and the row has no {part.kind}s"
    )
    raise BadRow(place, "media missing", detail)


def _split(part: Part, rest: dict[Kind, list[Any]], place: Place) -> list[Part]:
    parts: list[Part] = []
    at = 0
    for mark in _MARK.finditer(part.text):
        kind: Kind = next(k for k in _KINDS if k == mark.group(1))
        if kind not in rest:
            continue  # a word of the text
        if not rest[kind]:
            raise BadRow(place, _DIFFER, f"more marks <{kind}> than files")
        parts += [Part("text", part.text[at : mark.start()]), Part(kind, source=rest[kind].pop(0))]
        at = mark.end()
    parts.append(Part("text", part.text[at:]))
    return [p for p in parts if p.kind != "text" or p.text] or [part]
