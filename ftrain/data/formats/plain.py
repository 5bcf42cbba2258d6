"""Texts, token ids made beforehand, and media with captions."""

from typing import Any

import numpy as np

from ftrain.data.formats.fields import Fields, list_of, words_of
from ftrain.data.formats.messages import media_source
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Captioned, Kind, Part, Place, Prose, Tokens
from ftrain.data.sources.folder import MEDIA_ENDS

TEXTS = ("text", "content", "txt")
"""Names of the field of a plain text."""
IDS = ("input_ids", "tokens", "token_ids")
"""Names of the field of token ids."""
CAPTIONS = ("text", "caption", "txt", "transcript", "transcription", "sentence")
"""Names of the field of what is said of media."""
_KINDS: tuple[Kind, ...] = ("image", "audio", "video")


def read_text(fields: Fields, place: Place) -> Prose:
    """{"text"}. BadRow where it is null or empty."""
    name = next(name for name in TEXTS if name in fields)
    return Prose(words_of(fields, name, place), place=place)


def read_tokens(fields: Fields, place: Place) -> Tokens:
    """{"input_ids", "labels"}: whole numbers, of equal length. BadRow where they are not."""
    name = next(name for name in IDS if name in fields)
    ids = _numbers(fields, name, place)
    if not len(ids):
        raise BadRow(place, "empty text", f"{name!r} is empty")
    if ids.min() < 0:
        raise BadRow(place, "wrong type", f"{name!r} holds {ids.min()}, which is no token id")
    labels = None if fields.get("labels") is None else _numbers(fields, "labels", place)
    if labels is not None and len(labels) != len(ids):
        raise BadRow(place, "wrong length", f"{len(labels)} labels for {len(ids)} ids")
    return Tokens(ids, labels, place=place)


def _numbers(fields: Fields, name: str, place: Place) -> np.ndarray:
    value = fields.get(name)
    array = np.asarray(value if isinstance(value, np.ndarray) else list_of(fields, name, place))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise BadRow(place, "wrong type", f"{name!r} is no list of whole numbers")
    return array.astype(np.int64)


def media_field(fields: Fields) -> tuple[str, Kind] | None:
    """The field of a row that holds media, and its kind: named for the kind, or for the end of a file's name.

    >>> media_field({"jpg": b"...", "txt": "a cat"})
    ('jpg', 'image')
    """
    for name in fields:
        kind = next((k for k in _KINDS if k == name), None) or _kind_of_end(f".{name.rpartition('.')[2]}")
        if kind is not None:
            return name, kind
    return None


def _kind_of_end(end: str) -> Kind | None:
    return next((kind for kind in _KINDS if MEDIA_ENDS.get(end.lower()) == kind), None)


def caption_field(fields: Fields) -> str | None:
    """The field of a row that holds a caption; None where there is none."""
    return next((name for name in CAPTIONS if name in fields), None)


def read_captioned(fields: Fields, place: Place) -> Captioned:
    """{"image" or "audio" or "video", "text" or "caption"}: a path, bytes or an array. BadRow where one is null."""
    found, caption = media_field(fields), caption_field(fields)
    if found is None or caption is None:
        raise BadRow(place, "media missing", f"no media and caption among the fields {', '.join(fields)}")
    name, kind = found
    source: Any = media_source({kind: fields[name]}, kind)
    if source is None:
        raise BadRow(place, "media missing", f"{name!r} is null")
    return Captioned(Part(kind, source=source), words_of(fields, caption, place), place=place)
