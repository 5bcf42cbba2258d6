"""`open_samples`: the samples of data files, in any order, with the format that was found in their first rows."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ftrain.data.formats.known import Format, by_name, detect
from ftrain.data.rejects import BadRow, Rejects
from ftrain.data.sample import Sample
from ftrain.data.sources.opening import open_source
from ftrain.data.sources.source import Source

_log = logging.getLogger("ftrain.data")
_LOOKED_AT = 100


class Samples:
    """The rows of a source as samples of one format. Can be pickled, for worker processes, by the format's name."""

    def __init__(self, source: Source, format: Format) -> None:
        self.source, self.format = source, format

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        """The sample of row `index`. BadRow where the row is broken or lacks what its format needs."""
        fields, place = self.source[index]
        return self.format.read(fields, place)

    def taken(self, rejects: Rejects, *, rows: Sequence[int] | None = None) -> Iterator[Sample]:
        """The samples in order, or of `rows`; broken ones go to `rejects`. ValueError once those are too many."""
        for index in range(len(self)) if rows is None else rows:
            try:
                sample = self[index]
            except BadRow as error:
                rejects.add(error)
                continue
            rejects.took()
            yield sample

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "format": self.format.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.source, self.format = state["source"], by_name(state["format"])


def open_samples(
    spec: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    format: str | None = None,
    kinds: Sequence[type] = (),
) -> Samples:
    """The samples of what `spec` names (`open_source`).

    Args:
        spec: a path, a folder, a glob, a URL, or several.
        format: the name of the format; None finds it in the first rows, and tells it in the log.
        kinds: classes of samples that are wanted, where the format is found; none is any.

    ValueError where nothing can be read, there are no rows, or their format is unknown.
    """
    source = open_source(spec)
    where = ", ".join(os.fspath(path) for path in ([spec] if isinstance(spec, str | os.PathLike) else spec))
    if not len(source):
        raise ValueError(f"{where} has no rows")
    if format is not None:
        return Samples(source, by_name(format))
    rows, bad = _first_rows(source, rows=_LOOKED_AT)
    if not rows and bad is not None:
        raise ValueError(f"none of the first rows of {where} can be read; the first one: {bad}")
    found = detect(rows, kinds=kinds, where=where)
    _log.info("%s: %d rows of the format %s (%s)", where, len(source), found.name, found.keys)
    return Samples(source, found)


def first_rows(source: Source, *, rows: int = _LOOKED_AT) -> list[Mapping[str, Any]]:
    """The fields of those of the first rows that can be read."""
    return _first_rows(source, rows=rows)[0]


def _first_rows(source: Source, *, rows: int) -> tuple[list[Mapping[str, Any]], BadRow | None]:
    """The same, and what is wrong with the first one that cannot be read, which is told when it is its turn."""
    found, first = list[Mapping[str, Any]](), None
    for index in range(min(rows, len(source))):
        try:
            found.append(source[index].fields)
        except BadRow as error:
            first = first or error
    return found, first
