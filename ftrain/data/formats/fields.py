"""Fields of a row, checked: what is absent, null or of another type is a `BadRow` that names it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place

Fields = Mapping[str, Any]


def text_of(fields: Fields, name: str, place: Place) -> str:
    """A field that is a text, the empty one included. BadRow where it is null, absent or something else.

    >>> text_of({"text": None}, "text", Place("a.jsonl", 1))
    Traceback (most recent call last):
    ftrain.data.rejects.BadRow: a.jsonl, row 1: 'text' is null
    """
    value = fields.get(name)
    if value is None:
        raise BadRow(place, "null field", f"{name!r} is {'null' if name in fields else 'absent'}")
    if not isinstance(value, str):
        raise BadRow(place, "wrong type", f"{name!r} is a {type(value).__name__}, not a text")
    return value


def words_of(fields: Fields, name: str, place: Place) -> str:
    """A field that is a text with more than white space. BadRow where it is not."""
    value = text_of(fields, name, place)
    if not value.strip():
        raise BadRow(place, "empty text", f"{name!r} is empty")
    return value


def maybe_text(fields: Fields, name: str, place: Place) -> str:
    """A field that may be absent or null, which is the empty text. BadRow where it is something else."""
    return text_of(fields, name, place) if fields.get(name) is not None else ""


def list_of(fields: Fields, name: str, place: Place) -> Sequence[Any]:
    """A field that is a list, or the JSON of one as CSV files have it. BadRow where it is null, or something else."""
    value = fields.get(name)
    if value is None:
        raise BadRow(place, "null field", f"{name!r} is {'null' if name in fields else 'absent'}")
    if isinstance(value, str):
        value = parsed(value, name, place)
    if not isinstance(value, list | tuple):
        raise BadRow(place, "wrong type", f"{name!r} is a {type(value).__name__}, not a list")
    return value


def parsed(text: str, name: str, place: Place) -> Any:
    """The JSON of a text. BadRow where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(place, "invalid JSON", f"{name!r} is no JSON: {error}") from error


def object_of(value: Any, what: str, place: Place) -> Fields:
    """A value that is an object with fields. BadRow where it is not."""
    if not isinstance(value, Mapping):
        raise BadRow(
            place, "wrong type", f"{what} is {'null' if value is None else type(value).__name__}, not an object"
        )
    return value


def flag_of(fields: Fields, name: str, place: Place) -> bool:
    """A field that is true or false, or 1 or 0, as a number or a text. BadRow where it is not."""
    value = fields.get(name)
    found = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False, "-1": False}.get(
        str(value).lower()
    )
    if found is None:
        raise BadRow(place, "wrong type", f"{name!r} is {value!r}, not true or false")
    return found


def number_of(fields: Fields, name: str, place: Place) -> int:
    """A field that is a whole number, as a number or a text. BadRow where it is not."""
    value = fields.get(name)
    if isinstance(value, str) and value.strip().lstrip("-").isdigit():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        kind = "null field" if value is None else "wrong type"
        raise BadRow(place, kind, f"{name!r} is {value!r}, not a whole number")
    return value


def is_list(fields: Fields, name: str) -> bool:
    """Whether a field can be a list: it is one, or a text that begins as its JSON does."""
    value = fields.get(name)
    return isinstance(value, list | tuple) or (isinstance(value, str) and value.lstrip().startswith("["))
