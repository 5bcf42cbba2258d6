"""A file by its path or URL: its size, its bytes from any place, and a handle for those who parse it themselves."""

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from ftrain.data import sources


class File(Protocol):
    """A file. All methods raise ValueError, naming the file, where it cannot be read."""

    @property
    def path(self) -> str:
        """As the user gave it."""

    @property
    def size(self) -> int:
        """Bytes."""

    def read(self, start: int, size: int) -> bytes:
        """At most `size` bytes from byte `start` on."""

    def open(self) -> IO[bytes]:
        """A handle for reading, which the caller closes."""


@dataclass(frozen=True)
class LocalFile:
    """A file of this machine. It is opened for each reading, so that thousands of files need no descriptors."""

    path: str

    @property
    def size(self) -> int:
        """Bytes. ValueError where the file cannot be read."""
        try:
            return os.stat(self.path).st_size
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def read(self, start: int, size: int) -> bytes:
        """At most `size` bytes from byte `start` on. ValueError where the file cannot be read."""
        try:
            with open(self.path, "rb", buffering=0) as handle:
                handle.seek(start)
                return _all_of(handle, size)
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def open(self) -> IO[bytes]:
        """A handle for reading. ValueError where the file cannot be read."""
        try:
            return open(self.path, "rb")
        except OSError as error:
            raise _unreadable(self.path, error) from error


def _all_of(handle: IO[bytes], size: int) -> bytes:
    """Raw handles return at most 2 GiB at once."""
    parts = []
    while size > 0 and (part := handle.read(size)):
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _unreadable(path: str, error: OSError) -> ValueError:
    return ValueError(f"{path} cannot be read: {error.strerror or error}")


def is_url(path: str) -> bool:
    """Whether fsspec opens it.

    >>> is_url("s3://bucket/a.jsonl"), is_url("data/a.jsonl")
    (True, False)
    """
    return "://" in path


def open_file(path: str) -> File:
    """The file of a path, or of a URL that fsspec knows. ValueError for a URL without fsspec."""
    if not is_url(path):
        return LocalFile(path)
    remote: File = sources.remote.RemoteFile(path)
    return remote


def beside(path: str, name: str) -> str:
    """The path of `name`, which the file at `path` speaks of: `name` itself where it is absolute or a URL.

    >>> beside("data/chat.jsonl", "images/1.png")
    'data/images/1.png'
    """
    if is_url(name) or os.path.isabs(name):
        return name
    if is_url(path):
        return path.rsplit("/", 1)[0] + "/" + name
    return str(Path(path).parent / name)


def escapes(name: str) -> bool:
    """Whether a relative name leads out of its folder.

    >>> escapes("a/../../b"), escapes("/etc/passwd"), escapes("a/b.png")
    (True, True, False)
    """
    parts = PurePosixPath(name.replace("\\", "/"))
    return parts.is_absolute() or ".." in parts.parts or (len(name) > 1 and name[1] == ":")
