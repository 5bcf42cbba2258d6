"""`open_source`: the rows of a path, a URL, a glob, a folder, or several of these."""

import glob
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftrain.data import sources
from ftrain.data.cache import ByteCache
from ftrain.data.sources.files import File, beside, is_url, open_file
from ftrain.data.sources.folder import TEXT_ENDS, Described, end_of, open_texts
from ftrain.data.sources.json_array import open_json
from ftrain.data.sources.lines import Csv, JsonLines
from ftrain.data.sources.source import Joined, Source
from ftrain.data.sources.tar import TarFile

_log = logging.getLogger("ftrain.data")
_CACHE = 512 * 2**20
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".lz4")

_SPLIT = re.compile(r"(?:^|[/._-])(train|training|test|testing|validation|valid|val|dev|eval)(?=[/._-])", re.IGNORECASE)
"""A part of a file's path that says of which split it is, as the Hub finds splits."""

_Opener = Callable[[File, ByteCache], Source]
_OPENERS: dict[str, _Opener] = {
    ".jsonl": lambda file, _: JsonLines(file),
    ".ndjson": lambda file, _: JsonLines(file),
    ".json": lambda file, _: open_json(file),
    ".csv": lambda file, _: Csv(file),
    ".tsv": lambda file, _: Csv(file, delimiter="\t"),
    ".parquet": lambda file, cache: sources.parquet.ParquetFile(file, cache=cache),
    ".arrow": lambda file, _: sources.arrow.ArrowFile(file),
    ".feather": lambda file, _: sources.arrow.ArrowFile(file),
    ".tar": lambda file, _: TarFile(file),
}


def open_source(
    spec: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, cache_bytes: int = _CACHE
) -> Source:
    """The rows of what `spec` names, for reading in any order.

    Args:
        spec: a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .tar, or a text), a folder (of such files, of texts,
            of media with captions, or a dataset that `datasets` saved), a glob, a URL of these that fsspec knows, or a
            sequence of them, whose rows follow each other.
        cache_bytes: how much of decoded parquet files is kept in memory, over all files together.

    Raises:
        ValueError: there is no such file, it is of an unknown kind, it is broken as a whole, or it needs a package that
            is not installed. A broken row is a `BadRow` when it is read.
    """
    given = [spec] if isinstance(spec, str | os.PathLike) else list(spec)
    if not given:
        raise ValueError("no data: give the path of a file or a folder")
    cache = ByteCache(limit=cache_bytes)
    opened = [_open(os.fspath(path), cache) for path in given]
    return opened[0] if len(opened) == 1 else Joined(opened)


def _open(path: str, cache: ByteCache) -> Source:
    if is_url(path):
        return _open_url(path, cache)
    if os.path.isdir(path):
        return _open_folder(str(Path(path)), _inside(Path(path)), cache)
    if os.path.exists(path):
        return _open_file(path, cache)
    if glob.has_magic(path):
        found = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
        return _open_each(found, cache, path)
    raise ValueError(f"{path}: there is no such file or folder")


def _open_url(url: str, cache: ByteCache) -> Source:
    if glob.has_magic(url):
        return _open_each(sources.remote.matching(url), cache, url)
    if sources.remote.is_folder(url):
        return _open_folder(url.rstrip("/"), sources.remote.inside(url), cache)
    return _open_file(url, cache)


def _inside(folder: Path) -> dict[str, str]:
    """The files in a folder, but for hidden ones: their paths, and their names within it."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    named = {str(file): file.relative_to(folder) for file in files}
    return {path: str(name) for path, name in named.items() if not any(part.startswith(".") for part in name.parts)}


def _open_each(paths: Sequence[str], cache: ByteCache, named: str) -> Source:
    if not paths:
        raise ValueError(f"{named}: no file matches")
    if all(end_of(path) not in _OPENERS for path in paths):
        return open_texts(paths)
    return Joined([_open_file(path, cache) for path in paths])


def _open_file(path: str, cache: ByteCache) -> Source:
    end = end_of(path)
    if end in _OPENERS:
        return _OPENERS[end](open_file(path), cache)
    if end in TEXT_ENDS:
        return open_texts([path])
    if end in _PACKED:
        raise ValueError(f"{path} is compressed, so that rows cannot be read in any order: unpack it first")
    known = ", ".join([*_OPENERS, *TEXT_ENDS])
    raise ValueError(f"{path}: files that end in {end or 'nothing'} are of no known kind; known are {known}")


def _open_folder(folder: str, inner: Mapping[str, str], cache: ByteCache) -> Source:
    """A saved dataset, media with a metadata file, data files, media with captions, or texts: the first that it is.

    `inner`: the paths of its files, with their names within it.
    """
    paths, names = list(inner), set(inner.values())
    if "dataset_dict.json" in names:
        return _open_split(folder, inner, cache)
    if "state.json" in names and "dataset_info.json" in names:
        return _open_saved(folder, cache)
    described = [path for path in paths if inner[path] in _METADATA]
    if described:
        return Described(_open_file(described[0], cache), described[0])
    kinds = sorted(
        {end_of(path) for path in paths if end_of(path) in _OPENERS and inner[path] not in ("dataset_info.json",)}
    )
    if len(kinds) > 1:
        raise ValueError(
            f"{folder} has data files of several kinds ({', '.join(kinds)}): name one, as {folder}/*{kinds[0]}"
        )
    if kinds:
        return _open_each(_trained_on(folder, [path for path in paths if end_of(path) == kinds[0]]), cache, folder)
    try:
        return open_texts(paths)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _trained_on(folder: str, paths: Sequence[str]) -> list[str]:
    """Without the files of other splits, where some are named for the split "train"."""
    splits = {path: found[-1].lower() if (found := _SPLIT.findall(path[len(folder) :])) else "" for path in paths}
    if not any(split.startswith("train") for split in splits.values()):
        return list(paths)
    left = sorted(path for path, split in splits.items() if split and not split.startswith("train"))
    if left:
        shown = ", ".join(left[:5])
        _log.warning('%s: its split "train" is read, and not %s: give other files by name', folder, shown)
    return [path for path in paths if path not in left]


def _described(path: str) -> dict[str, Any]:
    file = open_file(path)
    try:
        found = json.loads(file.read(0, file.size))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object")
    return found


def _open_split(folder: str, inner: Mapping[str, str], cache: ByteCache) -> Source:
    """The split to train on: the only one, or "train"."""
    splits = _described(f"{folder}/dataset_dict.json").get("splits", [])
    chosen = "train" if "train" in splits else splits[0] if len(splits) == 1 else None
    if not isinstance(chosen, str):
        raise ValueError(f"{folder} holds the splits {', '.join(map(str, splits))}: name one, as {folder}/NAME")
    below = {path: name[len(chosen) + 1 :] for path, name in inner.items() if name.startswith(f"{chosen}/")}
    return _open_folder(f"{folder}/{chosen}", below, cache)


def _open_saved(folder: str, cache: ByteCache) -> Source:
    """A dataset as `datasets.Dataset.save_to_disk` leaves it."""
    files = _described(f"{folder}/state.json").get("_data_files")
    names = [entry.get("filename") for entry in files] if isinstance(files, list) else []
    if not names or not all(isinstance(name, str) and "/" not in name for name in names):
        raise ValueError(f"{folder}/state.json names no data files: it is no dataset that was saved whole")
    return Joined([_open_file(beside(f"{folder}/state.json", name), cache) for name in names])
