"""Tar files of samples as webdataset writes them: members with the same name up to the first dot are one row."""

import json
import tarfile
from typing import Any

from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place
from ftrain.data.sources.files import File, escapes
from ftrain.data.sources.lines import decode
from ftrain.data.sources.source import Row, checked

_TEXTS = ("txt", "text", "transcript", "caption")
_NUMBERS = ("cls", "cls2", "index")


class TarFile:
    """The rows of a tar file, read where they lie: nothing is unpacked.

    A field is named for what follows the first dot of its member, such as "jpg" or "seg.png"; `__key__` is the name up
    to there. Texts are decoded, JSON is parsed, "cls" is a number, all else is bytes.
    """

    def __init__(self, file: File) -> None:
        """ValueError where the file is no whole, plain tar file, or a member's name leads out of it or is a link."""
        self.file = file
        self._rows = _members(file)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        """Row `index`. BadRow where a text is no UTF-8, or JSON is broken."""
        place = Place(self.file.path, checked(index, len(self)) + 1)
        key, members = self._rows[index]
        fields: dict[str, Any] = {"__key__": key}
        for name, start, size in members:
            fields[name] = _value(name, self.file.read(start, size), place)
        return Row(fields, place)


def _members(file: File) -> list[tuple[str, list[tuple[str, int, int]]]]:
    rows: list[tuple[str, list[tuple[str, int, int]]]] = []
    end = 0
    try:
        with file.open() as handle, tarfile.open(fileobj=handle, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // 512) * 512
                if not member.isdir():
                    _add(rows, member, file.path)
            handle.seek(end)
            rest = handle.read(512)
    except tarfile.TarError as error:
        raise ValueError(f"{file.path} is no whole, uncompressed tar file: {error}") from error
    if end > file.size or rest.strip(b"\0") or 0 < len(rest) < 512:
        raise ValueError(f"{file.path} is cut off: its last whole member ends at byte {end} of {file.size}")
    return rows


def _add(rows: list[tuple[str, list[tuple[str, int, int]]]], member: tarfile.TarInfo, path: str) -> None:
    if escapes(member.name):
        raise ValueError(f"{path} has a member {member.name!r}, which leads out of its folder: the file is not read")
    if not member.isreg():
        raise ValueError(f"{path} has a member {member.name!r} that is no file but a link or a device: it is not read")
    folder, _, name = member.name.removeprefix("./").rpartition("/")
    stem, _, field = name.partition(".")
    if not stem or not field:
        return  # hidden files, and those without a kind, as webdataset does it
    key = f"{folder}/{stem}" if folder else stem
    if not rows or rows[-1][0] != key:
        rows.append((key, []))
    rows[-1][1].append((field.lower(), member.offset_data, member.size))


def _value(name: str, raw: bytes, place: Place) -> Any:
    kind = name.rpartition(".")[2]
    if kind in _TEXTS:
        return decode(raw, place)
    if kind in _NUMBERS and raw.strip().isdigit():
        return int(raw)
    if kind != "json":
        return raw
    try:
        return json.loads(decode(raw, place))
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadRow):
            raise
        raise BadRow(place, "invalid JSON", f"its member {name!r} is no JSON: {error}") from error
