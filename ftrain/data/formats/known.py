"""The formats that are known, in the order in which they are tried, and which of them rows have."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftrain.data import sample as samples
from ftrain.data.formats import instructions, judgements, plain, sharegpt
from ftrain.data.formats.fields import Fields, is_list
from ftrain.data.formats.media_marks import has_media, with_files
from ftrain.data.sample import Place, Sample
from ftrain.tree import nearest

_CUT = 300


@dataclass(frozen=True)
class Format:
    """How rows are read: `made(fields, place)` makes the sample of the texts, or raises BadRow.

    `keys` tells users which fields it has; `makes` is the class of its samples; `matches(fields)` is by names alone, so
    that a row with null in a field is one of its format. `marked`: `<image>` is never a word of its texts.
    """

    name: str
    keys: str
    makes: type
    matches: Callable[[Fields], bool]
    made: Callable[[Fields, Place], Sample]
    marked: bool = False

    def read(self, fields: Fields, place: Place) -> Sample:
        """The sample of a row, with the media that its fields name. BadRow where it is none of this format."""
        return with_files(self.made(fields, place), fields, place, marked=self.marked)


def _has(*names: str) -> Callable[[Fields], bool]:
    return lambda fields: all(name in fields for name in names)


def _any(fields: Fields, names: Sequence[str]) -> bool:
    return any(name in fields for name in names)


def _is_judged_chat(fields: Fields) -> bool:
    chats = _any(fields, ("messages", "conversations"))
    return chats and ("kto_tag" in fields or isinstance(fields.get("label"), bool))


def _is_implicit(fields: Fields) -> bool:
    return "chosen" in fields and "rejected" in fields and not _any(fields, ("prompt", "instruction", "conversations"))


def _is_captioned(fields: Fields) -> bool:
    return plain.media_field(fields) is not None and plain.caption_field(fields) is not None


_SHAREGPT, _OPENAI = '"conversations": [{"from", "value"}]', '"messages": [{"role", "content"}]'
FORMATS: tuple[Format, ...] = (
    Format("preference", '"prompt", "chosen", "rejected"', samples.Preference, _has("prompt", "chosen", "rejected"),
           judgements.read_preference),
    Format("preference-alpaca", '"instruction", "input", "chosen", "rejected"', samples.Preference,
           _has("instruction", "chosen", "rejected"), judgements.read_alpaca_preference),
    Format("preference-sharegpt", f'{_SHAREGPT}, "chosen", "rejected"', samples.Preference,
           _has("conversations", "chosen", "rejected"), judgements.read_sharegpt_preference),
    Format("preference-implicit", '"chosen", "rejected"', samples.Preference, _is_implicit, judgements.read_implicit),
    Format("preference-swift", '"messages" or "query" and "response", "rejected_response"', samples.Preference,
           _has("rejected_response"), judgements.read_swift_preference),
    Format("kto", '"prompt", "completion", "label"', samples.Judged, _has("prompt", "completion", "label"),
           judgements.read_judged),
    Format("kto-chat", '"messages" or "conversations", "kto_tag"', samples.Judged, _is_judged_chat,
           judgements.read_judged_chat),
    Format("llava", f'{_SHAREGPT}, "image"', samples.Chat, lambda f: sharegpt.is_sharegpt(f) and has_media(f),
           sharegpt.read, marked=True),
    Format("sharegpt", f'{_SHAREGPT}, "system", "tools"', samples.Chat, sharegpt.is_sharegpt, sharegpt.read),
    Format("swift-messages", f'{_OPENAI}, "images"', samples.Chat, lambda f: is_list(f, "messages") and has_media(f),
           instructions.read_messages, marked=True),
    Format("openai", f'{_OPENAI}, "tools"', samples.Chat, _has("messages"), instructions.read_messages),
    Format("openai-conversations", '"conversations": [{"role", "content"}]', samples.Chat,
           lambda f: is_list(f, "conversations"),
           lambda f, place: instructions.read_messages({**f, "messages": f["conversations"]}, place)),
    Format("swift", '"query", "response", "history", "images"', samples.Chat, _has("query", "response"),
           instructions.read_swift),
    Format("alpaca", '"instruction", "input", "output"', samples.Chat, _has("instruction", "output"),
           instructions.read_alpaca),
    Format("prompt-completion", '"prompt", "completion"', samples.Chat, _has("prompt", "completion"),
           instructions.read_completion),
    Format("pairs", '"query" or "anchor", "positive", "negative"', samples.Pair,
           lambda f: _any(f, judgements.QUERIES) and _any(f, judgements.POSITIVES), judgements.read_pair),
    Format("tokens", '"input_ids", "labels"', samples.Tokens, lambda f: _any(f, plain.IDS), plain.read_tokens),
    Format("captioned", '"image" or "audio" or "video", "text"', samples.Captioned, _is_captioned,
           plain.read_captioned),
    Format("classes", '"text", "label"', samples.Classed, _has("text", "label"), judgements.read_classed),
    Format("text", '"text"', samples.Prose, lambda f: _any(f, plain.TEXTS), plain.read_text),
)  # fmt: skip
"""All of them; the first that matches a row is the one that it has."""


def by_name(name: str) -> Format:
    """The format of a name. ValueError, with the nearest one, where there is none.

    >>> by_name("alpaca").keys
    '"instruction", "input", "output"'
    """
    found = {format.name: format for format in FORMATS}
    if name not in found:
        near = nearest(name, list(found))
        meant = f"did you mean {near!r} of" if near else "there are"
        raise ValueError(f"there is no format {name!r}; {meant} {', '.join(found)}")
    return found[name]


def detect(rows: Sequence[Mapping[str, Any]], *, kinds: Sequence[type] = (), where: str = "the data") -> Format:
    """The format that most of these rows have.

    Args:
        rows: the fields of the first rows of the data.
        kinds: classes of samples that are wanted; formats of others are left out.
        where: what the rows are of, for the error.

    ValueError, with the first row and the known formats, where no format has at least half of them.

    >>> detect([{"text": "a"}, {"text": None}]).name
    'text'
    """
    formats = [format for format in FORMATS if not kinds or format.makes in kinds]
    counts = {format.name: 0 for format in formats}
    for row in rows:
        found = next((format for format in formats if format.matches(row)), None)
        if found is not None:
            counts[found.name] += 1
    best = max(counts, key=lambda name: counts[name], default=None)
    if best is None or 2 * counts[best] < max(1, len(rows)):
        raise ValueError(_unknown(rows, formats, where))
    return by_name(best)


def _unknown(rows: Sequence[Mapping[str, Any]], formats: Sequence[Format], where: str) -> str:
    known = "; ".join(f"{format.name}: {format.keys}" for format in formats)
    if not rows:
        return f"{where} has no rows that can be read; known formats are {known}"
    other = next((format for format in FORMATS if format not in formats and format.matches(rows[0])), None)
    if other is not None:
        return (
            f"{where} has rows of the format {other.name} ({other.keys}), which this task cannot use. It takes {known}"
        )
    return f"{where} has rows of an unknown format, first of all {shown(rows[0])}. Known formats are {known}"


def shown(fields: Mapping[str, Any]) -> str:
    """A row as text, cut to some hundred characters.

    >>> shown({"a": 1})
    '{"a": 1}'
    """
    short = {name: f"{len(value)} bytes" if isinstance(value, bytes) else value for name, value in fields.items()}
    text = json.dumps(short, ensure_ascii=False, default=lambda value: f"a {type(value).__name__}")
    return text if len(text) <= _CUT else text[:_CUT] + "..."
