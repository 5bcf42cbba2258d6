"""Plain folders: of texts, a row each, or of media with captions beside them or in a metadata file.

Media kinds are known by the ends of file names.
"""

from collections.abc import Sequence
from pathlib import PurePosixPath

from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place
from ftrain.data.sources.files import beside, escapes, open_file
from ftrain.data.sources.lines import decode
from ftrain.data.sources.source import Row, Source, checked

TEXT_ENDS = (".txt", ".md", ".text", ".rst")
MEDIA_ENDS = {
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"), "image"),
    **dict.fromkeys((".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac"), "audio"),
    **dict.fromkeys((".mp4", ".mkv", ".webm", ".mov", ".avi"), "video"),
}
"""The kind of media by the end of a file's name."""
_CAPTION_ENDS = (".txt", ".caption")


def end_of(path: str) -> str:
    """The end of a file's name, in small letters.

    >>> end_of("a/B.JPG")
    '.jpg'
    """
    return PurePosixPath(path.replace("\\", "/")).suffix.lower()


class TextFiles:
    """Files of text, a row each with the field "text"."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Row:
        """Row `index`. BadRow where the file is no UTF-8, ValueError where it cannot be read."""
        file = open_file(self.paths[checked(index, len(self))])
        place = Place(file.path, 1)
        return Row({"text": decode(file.read(0, file.size), place)}, place)


class CaptionedFiles:
    """Media files with captions of the same name: rows with a field "image", "audio" or "video", a path, and "text"."""

    def __init__(self, media: Sequence[str], captions: Sequence[str]) -> None:
        self.media = tuple(media)
        self._captions = {_stem(path): path for path in captions}

    def __len__(self) -> int:
        return len(self.media)

    def __getitem__(self, index: int) -> Row:
        """Row `index`. BadRow where the media file has no caption, or one that is no UTF-8."""
        path = self.media[checked(index, len(self))]
        place = Place(path, 1)
        caption = self._captions.get(_stem(path))
        if caption is None:
            raise BadRow(place, "no caption", f"no caption beside it: write {_stem(path)}.txt")
        file = open_file(caption)
        text = decode(file.read(0, file.size), place).strip()
        return Row({MEDIA_ENDS[end_of(path)]: path, "text": text}, place)


def _stem(path: str) -> str:
    return path[: -len(end_of(path))] if end_of(path) else path


class Described:
    """Media files of a folder that a metadata file names in its field "file_name"."""

    def __init__(self, rows: Source, path: str) -> None:
        self.rows, self.path = rows, path

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        """Row `index`. BadRow where the name of its file is absent, leads out of the folder, or is of no known kind."""
        fields, place = self.rows[index]
        name = fields.get("file_name")
        if not isinstance(name, str) or not name:
            raise BadRow(place, "no file name", f"'file_name' is {name!r}, not the name of a media file")
        if escapes(name):
            raise BadRow(place, "path escape", f"'file_name' {name!r} leads out of the folder of {self.path}")
        kind = MEDIA_ENDS.get(end_of(name))
        if kind is None:
            raise BadRow(place, "unknown media", f"'file_name' {name!r} is no picture, recording or film that is known")
        rest = {key: value for key, value in fields.items() if key != "file_name"}
        return Row({kind: beside(self.path, name), **rest}, place)


def open_texts(paths: Sequence[str]) -> Source:
    """The source of a folder with these files: media with captions where there are media, else texts.

    ValueError where there are neither.
    """
    media = [path for path in paths if end_of(path) in MEDIA_ENDS]
    if media:
        return CaptionedFiles(media, [path for path in paths if end_of(path) in _CAPTION_ENDS])
    texts = [path for path in paths if end_of(path) in TEXT_ENDS]
    if not texts:
        shown = ", ".join(paths[:5]) + (", ..." if len(paths) > 5 else "")
        raise ValueError(f"no data files, media or texts among {len(paths)} files ({shown or 'none'})")
    return TextFiles(texts)
