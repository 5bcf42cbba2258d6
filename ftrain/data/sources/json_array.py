"""A JSON file that is one array of objects, or an object with one such array; read whole."""

import json
from typing import Any

from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place
from ftrain.data.sources.files import File
from ftrain.data.sources.lines import JsonLines
from ftrain.data.sources.source import Row, Source, checked

_LARGE = 4 * 2**30


class JsonArray:
    """The objects of an array that was read. `files` of several GB are better JSONL, which is read row by row."""

    def __init__(self, file: File, rows: list[Any]) -> None:
        self.file, self._rows = file, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        """Row `index`. BadRow where it is no object."""
        place = Place(self.file.path, checked(index, len(self)) + 1)
        fields = self._rows[index]
        if not isinstance(fields, dict):
            raise BadRow(place, "no JSON object", f"a {type(fields).__name__}, not an object with fields")
        return Row(fields, place)


def open_json(file: File) -> Source:
    """The rows of a .json file: an array, an object that holds one, or objects a line as in JSONL.

    ValueError where it is none of these, or too large to be read whole.
    """
    if file.size > _LARGE:
        raise ValueError(f"{file.path} has {file.size} bytes, too many for one JSON array: write a row a line (.jsonl)")
    raw = file.read(0, file.size)
    if not raw.strip():
        raise ValueError(f"{file.path} is empty")
    try:
        found = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.path} is not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        if raw.lstrip()[:1] == b"{" and len(raw.splitlines()) > 1:
            return JsonLines(file)
        raise ValueError(f"{file.path} is no JSON: {error}") from error
    return JsonArray(file, _rows_of(found, file.path))


def _rows_of(found: Any, path: str) -> list[Any]:
    if isinstance(found, list):
        return found
    arrays = [name for name, value in found.items() if isinstance(value, list)] if isinstance(found, dict) else []
    if len(arrays) == 1 and arrays[0] in ("data", "rows", "train", "examples", "items"):
        return list(found[arrays[0]])
    if isinstance(found, dict):
        return [found]
    raise ValueError(f"{path} is a JSON {type(found).__name__}, not an array of rows")
