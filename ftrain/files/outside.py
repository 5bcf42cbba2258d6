"""JSON that may come from anybody: parsed within bounds, and checked to be what it should, before it is used.

    ROW = record({"step": whole(), "loss": number()}, others=True)
    row = check(parse(content, "metrics.jsonl"), ROW, "metrics.jsonl")

A shape is a function that raises `Misfit`; the others here make such functions.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from ftrain.files.beneath import read_file

JSON_BYTES = 2**26
"""The largest file of JSON that is read, unless a caller says otherwise."""

Shape = Callable[[Any, str], None]
"""Called with a value and where it is, in words."""


class Misfit(ValueError):
    """A value is not of its shape. The message says which, and what it should be."""


def read_json(path: str | os.PathLike[str], *, limit: int = JSON_BYTES) -> Any:
    """What a JSON file that the caller names holds.

    Args:
        path: of the file, through links if it likes.
        limit: how many bytes it may have.

    Raises:
        ValueError: it is no JSON or nested too deeply, no regular file (NotPlain), or larger; it is named.
        OSError: it is missing (FileNotFoundError) or cannot be read.
    """
    return parse(read_file(path, limit=limit), os.fspath(path))


def parse(content: bytes | str, shown: str) -> Any:
    """What the text `shown` holds; ValueError if it is no JSON, or is nested deeper than Python can follow."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError(f"{shown} is no JSON of ours: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{shown} is not JSON ({error})") from None


def check(value: Any, shape: Shape, shown: str) -> Any:
    """The value, if it has the shape; ValueError that names the file `shown` and the entry."""
    try:
        shape(value, "")
    except Misfit as misfit:
        raise ValueError(f"{shown}: {misfit}") from None
    return value


def whole(least: int = 0, most: int = 2**63 - 1) -> Shape:
    """A whole number within bounds; True and 1.0 are none. The shape raises Misfit for another value."""

    def shape(value: Any, at: str) -> None:
        if type(value) is not int or not least <= value <= most:
            _refuse(value, at, f"a whole number from {least} to {most}")

    return shape


def number(least: float = -math.inf, *, finite: bool = True) -> Shape:
    """A number of at least `least`; NaN and infinities only where they need not be `finite`; else Misfit."""

    def shape(value: Any, at: str) -> None:
        known = type(value) in (int, float)
        if known and not finite and (value != value or abs(value) == math.inf):
            return
        if not known or abs(value) > 1e308 or value != value or value < least:
            _refuse(value, at, "a number" if least == -math.inf else f"a number of at least {least:g}")

    return shape


def text(longest: int = 2**16) -> Shape:
    """A text that can be written as UTF-8, of at most so many characters. The shape raises Misfit."""

    def shape(value: Any, at: str) -> None:
        if not isinstance(value, str) or len(value) > longest or any("\ud800" <= c <= "\udfff" for c in value):
            _refuse(value, at, f"a text of at most {longest} characters")

    return shape


def flag(value: Any, at: str) -> None:
    """True or False; Misfit for another value."""
    if not isinstance(value, bool):
        _refuse(value, at, "true or false")


def anything(value: Any, at: str) -> None:
    """Any value."""


def one_of(*values: Any) -> Shape:
    """One of these, and of its type. The shape raises Misfit for another value."""

    def shape(value: Any, at: str) -> None:
        if not any(type(value) is type(known) and value == known for known in values):
            _refuse(value, at, f"one of {', '.join(map(repr, values))}")

    return shape


def either(*shapes: Shape) -> Shape:
    """Of one of these shapes; the Misfit of the last is raised."""

    def shape(value: Any, at: str) -> None:
        misfits = []
        for known in shapes:
            try:
                return known(value, at)
            except Misfit as misfit:
                misfits.append(misfit)
        raise misfits[-1]

    return shape


def listed(item: Shape, *, least: int = 0) -> Shape:
    """A list of such items, at least so many. The shape raises Misfit for another value, and an item's."""

    def shape(value: Any, at: str) -> None:
        if not isinstance(value, list) or len(value) < least:
            _refuse(value, at, "a list" if not least else f"a list of at least {least}")
        for i, entry in enumerate(value):
            item(entry, f"{at}[{i}]")

    return shape


def mapped(item: Shape) -> Shape:
    """An object whose entries are all of one shape. The shape raises Misfit for another value, and an entry's."""

    def shape(value: Any, at: str) -> None:
        if not isinstance(value, dict):
            _refuse(value, at, "an object")
        for name, entry in value.items():
            item(entry, f"{at}.{name}" if at else name)

    return shape


def record(entries: Mapping[str, Shape], *, optional: Mapping[str, Shape] | None = None, others: bool = False) -> Shape:
    """An object with these entries, and maybe the `optional` ones; with `others` further ones of any shape.

    The shape raises Misfit for another value, naming the entry and what it should be.

    >>> from ftrain.files.outside import check, listed, number, record, whole
    >>> row = record({"step": whole(1), "losses": listed(number())})
    >>> check({"step": 3, "losses": [0.5]}, row, "metrics.json")
    {'step': 3, 'losses': [0.5]}
    >>> check({"step": 0, "losses": []}, row, "metrics.json")
    Traceback (most recent call last):
    ValueError: metrics.json: step is 0, not a whole number from 1 to 9223372036854775807
    """
    rest = dict(optional or {})

    def shape(value: Any, at: str) -> None:
        if not isinstance(value, dict):
            _refuse(value, at, "an object")
        lost = [name for name in entries if name not in value]
        strange = [] if others else [name for name in value if name not in entries and name not in rest]
        if lost or strange:
            which = f"has no {lost[0]!r}" if lost else f"has {_short(strange[0])}, which is not known"
            raise Misfit(f"{at or 'the object'} {which}; its entries should be {', '.join([*entries, *rest])}")
        for name, known in {**entries, **rest}.items():
            if name in value:
                known(value[name], f"{at}.{name}" if at else name)

    return shape


def _refuse(value: Any, at: str, wanted: str) -> None:
    raise Misfit(f"{at or 'the value'} is {_short(value)}, not {wanted}")


def _short(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    shown = ascii(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
