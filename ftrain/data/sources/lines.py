"""Files with a row a line, JSONL and CSV: an index of where rows begin, and each row read from its bytes."""

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place
from ftrain.data.sources.files import File
from ftrain.data.sources.source import Row, checked

_CHUNK = 8 * 2**20
_NEWLINE, _QUOTE = 10, 34
_BOM = b"\xef\xbb\xbf"
_VALUE = {d: re.compile(rf'(?:"([^"]*(?:""[^"]*)*)"|([^"{d}]*))(?={d}|\Z)') for d in (",", "\t", ";")}


@dataclass(frozen=True, eq=False)
class LineIndex:
    """Where rows lie in a file: bytes `[starts[i], ends[i])`, int64 `[rows]`, and the line `lines[i]`, from 1."""

    starts: np.ndarray
    ends: np.ndarray
    lines: np.ndarray

    @staticmethod
    def of(file: File, *, quotes: bool = False) -> "LineIndex":
        """Read a file once; empty lines are no rows. With `quotes` a newline within double quotes ends no row.

        ValueError where the file cannot be read.
        """
        size, open_quotes, found = file.size, 0, []
        for start in range(0, size, _CHUNK):
            chunk = np.frombuffer(file.read(start, _CHUNK), np.uint8)
            ends = np.flatnonzero(chunk == _NEWLINE)
            if quotes:
                before = np.cumsum(chunk == _QUOTE)
                if before.size:
                    ends, open_quotes = ends[(before[ends] + open_quotes) % 2 == 0], open_quotes + int(before[-1])
            found.append(ends.astype(np.int64) + start)
        ends = np.concatenate([*found, [size]]).astype(np.int64)
        starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
        rows = np.flatnonzero(ends > starts)
        return LineIndex(starts[rows], ends[rows], rows + 1)


class JsonLines:
    """A file with a JSON object a line."""

    def __init__(self, file: File) -> None:
        """ValueError where the file cannot be read."""
        self.file = file
        self._index = LineIndex.of(file)
        self._rows = _not_blank(file, self._index)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        """Row `index`. BadRow where the line is no JSON object in UTF-8."""
        row = int(self._rows[checked(index, len(self))])
        place = Place(self.file.path, int(self._index.lines[row]))
        return Row(parse_object(_text(self.file, self._index, row, place), place), place)


def _not_blank(file: File, index: LineIndex) -> np.ndarray:
    """The rows that are not just white space: only short ones can be that, and those are looked at."""
    keep = np.ones(len(index.starts), bool)
    for row in np.flatnonzero(index.ends - index.starts <= 2):
        keep[row] = bool(file.read(int(index.starts[row]), int(index.ends[row] - index.starts[row])).strip())
    return np.flatnonzero(keep)


def _text(file: File, index: LineIndex, row: int, place: Place) -> str:
    start, end = int(index.starts[row]), int(index.ends[row])
    raw = file.read(start, end - start)
    if len(raw) < end - start:
        raise ValueError(f"{file.path} became shorter while it was read")
    return decode(raw[len(_BOM) :] if start == 0 and raw.startswith(_BOM) else raw, place)


def decode(raw: bytes, place: Place) -> str:
    """Bytes as UTF-8. BadRow where they are not.

    >>> decode(b"caf\\xe9", Place("a.txt", 1))
    Traceback (most recent call last):
    ftrain.data.rejects.BadRow: a.txt, row 1: not UTF-8: byte 0xe9 at place 3
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(place, "not UTF-8", f"not UTF-8: byte 0x{raw[error.start]:02x} at place {error.start}") from error


def parse_object(text: str, place: Place) -> dict[str, Any]:
    """A JSON object of a text. BadRow where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(place, "invalid JSON", f"no JSON: {error}; it begins {text[:60]!r}") from error
    if not isinstance(found, dict):
        raise BadRow(place, "no JSON object", f"a {type(found).__name__}, not an object with fields: {text[:60]!r}")
    return found


class Csv:
    """A file of comma- or tab-separated values; the first row names the fields, and all values are texts.

    The standard library's reader refuses long values unless a limit of the whole process is raised.
    """

    def __init__(self, file: File, *, delimiter: str = ",") -> None:
        """ValueError where the file cannot be read, or has no row of names (a BadRow of it is no reject but this)."""
        self.file, self._delimiter = file, delimiter
        self._index = LineIndex.of(file, quotes=True)
        if not len(self._index.starts):
            raise ValueError(f"{file.path} is empty: a CSV file begins with the names of its columns")
        try:
            self.names = self._fields(0)
        except BadRow as error:
            raise ValueError(f"the names of columns cannot be read: {error}") from error
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"{file.path} names a column twice: {', '.join(self.names)}")

    def __len__(self) -> int:
        return len(self._index.starts) - 1

    def __getitem__(self, index: int) -> Row:
        """Row `index`. BadRow where it is no UTF-8, or has another number of values than there are names."""
        place = self._place(checked(index, len(self)) + 1)
        values = self._fields(index + 1)
        if len(values) != len(self.names):
            detail = f"{len(values)} values for the {len(self.names)} columns {', '.join(self.names)}"
            raise BadRow(place, "wrong number of values", detail)
        return Row(dict(zip(self.names, values, strict=True)), place)

    def _place(self, row: int) -> Place:
        return Place(self.file.path, int(self._index.lines[row]))

    def _fields(self, row: int) -> list[str]:
        place = self._place(row)
        text = _text(self.file, self._index, row, place).removesuffix("\r")
        values, at = [], 0
        while at <= len(text):
            found = _VALUE[self._delimiter].match(text, at)
            if found is None:
                raise BadRow(place, "invalid CSV", f"no row of CSV at character {at}; it begins {text[:60]!r}")
            quoted, plain = found.groups()
            values.append(plain if quoted is None else quoted.replace('""', '"'))
            at = found.end() + 1
        return values
