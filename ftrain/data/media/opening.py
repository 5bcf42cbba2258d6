"""The bytes of media: of a file beside the row's file, of a URL that fsspec knows, or in the row itself."""

import base64
import binascii
import io
import re
from typing import IO, Any

from ftrain.data.media.limits import Limits
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place
from ftrain.data.sources.files import File, beside, open_file

_DATA_URL = re.compile(r"data:[\w/+.\-]*(?:;[\w=\-]+)*;base64,")


def name_of(source: Any) -> str:
    """A few words for messages: the path, or how many bytes there are."""
    if isinstance(source, bytes | bytearray | memoryview):
        return f"media of {len(source)} bytes"
    return source if isinstance(source, str) and len(source) < 200 else f"a {type(source).__name__}"


def path_of(source: Any, place: Place) -> str | None:
    """The path or URL of a source that is one, relative to the file of the row; None where it is in the row.

    >>> path_of("images/1.png", Place("data/chat.jsonl", 1))
    'data/images/1.png'
    """
    if not isinstance(source, str) or _DATA_URL.match(source):
        return None
    return beside(place.file, source)


def media_bytes(source: Any, place: Place, limits: Limits) -> bytes:
    """The bytes of a path, of a data URL, or as they are.

    BadRow where there is no such file, it is too large, on the web, or of another type.
    """
    found = _found(source, place, limits)
    if isinstance(found, bytes):
        return found
    try:
        return found.read(0, found.size)
    except ValueError as error:
        raise BadRow(place, "media missing", str(error)) from error


def media_file(source: Any, place: Place, limits: Limits) -> IO[bytes]:
    """A handle for reading, of which a header takes the beginning; the caller closes it. BadRow as `media_bytes`."""
    found = _found(source, place, limits)
    if isinstance(found, bytes):
        return io.BytesIO(found)
    try:
        return found.open()
    except ValueError as error:
        raise BadRow(place, "media missing", str(error)) from error


def _found(source: Any, place: Place, limits: Limits) -> bytes | File:
    if isinstance(source, bytes | bytearray | memoryview):
        limits.check("file_bytes", len(source), place, name_of(source))
        return bytes(source)
    if not isinstance(source, str) or not source:
        raise BadRow(place, "media missing", f"{name_of(source)} is no path and no bytes of media")
    path = path_of(source, place)
    if path is None:
        return _decoded(source, place, limits)
    if path.startswith(("http://", "https://")):
        raise BadRow(place, "media on the web", f"{path} is on the web: nothing is fetched, write it to a file first")
    try:
        file = open_file(path)
        limits.check("file_bytes", file.size, place, path)
    except ValueError as error:
        if isinstance(error, BadRow):
            raise
        raise BadRow(place, "media missing", str(error)) from error
    return file


def _decoded(source: str, place: Place, limits: Limits) -> bytes:
    text = source[source.index(",") + 1 :]
    limits.check("file_bytes", len(text) * 3 / 4, place, "a data URL")
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise BadRow(place, "broken media", f"a data URL is no base64: {error}") from error
