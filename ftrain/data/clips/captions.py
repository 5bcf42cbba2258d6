"""Which videos a folder has, and what is said of each: a list of captions, or a text file beside each video."""

import csv
import html
import io
import re
from pathlib import Path
from typing import NamedTuple

from ftrain.data.sample import Place
from ftrain.files.beneath import read_file
from ftrain.files.outside import JSON_BYTES, parse

try:  # as diffusers does where it is installed: it mends broken letters
    import ftfy
except ImportError:
    ftfy = None

VIDEOS = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif"})
_LISTS = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
_FILE = ("file_name", "file", "video", "path")
_TEXT = ("text", "caption", "prompt")
CLEANING = "ftfy, html, spaces" if ftfy is not None else "html, spaces"
"""What `cleaned` does here, for a cache to remember: with ftfy installed other letters come out."""


class Video(NamedTuple):
    """A video by its `path`, what is said of it, and `place`, where that stands."""

    path: Path
    caption: str
    place: Place


def cleaned(text: str) -> str:
    """A caption as Wan's pipelines read it: broken letters mended where ftfy is installed, HTML's entities as letters,
    and one space between words.

    >>> cleaned(" a  cat\\n&amp;amp; a dog ")
    'a cat & a dog'
    """
    text = text if ftfy is None else ftfy.fix_text(text)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text)).strip()).strip()


def videos_of(folder: Path, captions: Path | None = None) -> list[Video]:
    """The videos of a folder with captions, in the order of the list or of their paths.

    - `captions`: a list, csv with a head or jsonl, whose rows have a file (`file_name`, `file`, `video` or `path`,
      relative to the folder) and what is said of it (`text`, `caption` or `prompt`). None: the one list in the folder
      (captions or metadata, .csv or .jsonl), or else a .txt beside each video.

    ValueError, which names the file and the row, where there is no video, no caption, or a list that is none; OSError
    where a file cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder of videos")
    lists = [folder / name for name in _LISTS if (folder / name).is_file()]
    if captions is None and len(lists) > 1:
        raise ValueError(f"{folder} has {lists[0].name} and {lists[1].name}: say which by --captions")
    listed = captions or (lists[0] if lists else None)
    found = _beside(folder) if listed is None else _of_list(folder, listed)
    if not found:
        kinds = ", ".join(sorted(VIDEOS))
        raise ValueError(f"{listed or folder} has no videos: give a folder with files of {kinds}, or a list of them")
    return found


def _beside(folder: Path) -> list[Video]:
    found = list[Video]()
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEOS and p.is_file()):
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise ValueError(f"{path} has no {text.name} beside it: write what it shows there, or give --captions LIST")
        found.append(Video(path, _decoded(text), Place(str(text), 1)))
    return found


def _decoded(file: Path) -> str:
    try:
        return read_file(file, limit=JSON_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error}") from error


def _of_list(folder: Path, listed: Path) -> list[Video]:
    text = _decoded(listed)
    if listed.suffix == ".csv":
        rows = list(enumerate(csv.DictReader(io.StringIO(text, newline="")), 2))
    elif listed.suffix == ".jsonl":
        lines = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())  # U+2028 is of a text
        rows = [(n, parse(line, f"{listed}, row {n}")) for n, line in lines]
    else:
        raise ValueError(f"--captions {listed}: a list is .csv or .jsonl")
    return [_row(folder, row, Place(str(listed), number)) for number, row in rows]


def _row(folder: Path, row: object, place: Place) -> Video:
    words = row if isinstance(row, dict) else {}
    file = next((words[name] for name in _FILE if words.get(name)), None)
    text = next((words[name] for name in _TEXT if words.get(name) is not None), None)
    if not isinstance(file, str) or not isinstance(text, str):
        raise ValueError(f"{place}: a row needs one of {', '.join(_FILE)}, and one of {', '.join(_TEXT)}")
    path = folder / file
    if not path.is_file():
        raise ValueError(f"{place}: {path} is missing: paths are relative to the folder of videos")
    return Video(path, text, place)
