"""Files that may come from anybody: opened below their folder, regular, and no larger than they may be.

A name out of a checkpoint, a run or a model's folder is data: it may climb out with `..`, be a link to somebody's keys,
a pipe that never answers, or a device without an end. So a folder is held open, and what is opened through it is found
from there part by part, without following links; only regular files of a bounded size are read.
"""

import os
import stat
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

_QUIET = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC  # a pipe or a terminal must not hold the caller up
_BLOCK = 2**20


class NotPlain(ValueError):
    """What a name leads to is no regular file of a permitted size below its folder. The message names it."""


class Folder:
    """A folder held open: also when its name goes to another one, what is read through it is of this one.

    A context manager. Its own path may be a link, for it is the caller's; nothing below it may be one.

    >>> import pathlib, tempfile
    >>> from ftrain.files.beneath import Folder
    >>> path = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (path / "a.txt").write_text("hello")
    >>> (path / "b.txt").symlink_to("/etc/passwd")
    >>> with Folder(path) as folder:
    ...     print(folder.read("a.txt", limit=100))
    ...     folder.read("b.txt", limit=100)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ftrain.files.beneath.NotPlain: /.../b.txt is a link, not a regular file
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """FileNotFoundError or NotADirectoryError when there is no such folder."""
        self.path = Path(path)
        self._descriptor = os.open(path, _QUIET | os.O_DIRECTORY)
        self.close = weakref.finalize(self, os.close, self._descriptor)
        """Let go of it; also done when nothing holds this object."""

    def __enter__(self) -> "Folder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self, name: str, *, limit: int | None = None) -> int:
        """A descriptor of the regular file `name`, of at most `limit` bytes, for reading; the caller closes it.

        Raises:
            NotPlain: the name leads out of the folder, or to something else.
            OSError: it is missing or cannot be read.
        """
        *folders, last = _parts(name, self.path)
        with self._within(folders) as at:
            return _open_regular(last, at, self.path / name, limit)

    def read(self, name: str, *, limit: int) -> bytes:
        """The content of the file `name`, of at most `limit` bytes.

        Raises:
            NotPlain: as `open`, or the file grows beyond `limit` while it is read.
            OSError: it is missing or cannot be read.
        """
        descriptor = self.open(name, limit=limit)
        try:
            return _read(descriptor, self.path / name, limit)
        finally:
            os.close(descriptor)

    def size(self, name: str) -> int:
        """The bytes of the regular file `name`; raises what `open` raises."""
        descriptor = self.open(name)
        try:
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    def require_plain(self, name: str) -> None:
        """Check a folder for readers that open names themselves, and follow links.

        Raises:
            NotPlain: something in it, at any depth, is neither a folder nor a regular file.
            OSError: it is missing (FileNotFoundError) or cannot be read.
        """
        with self._within(_parts(name, self.path)) as at:
            _require_plain(at, self.path / name)

    def system_path(self) -> str:
        """A path for readers that want one: of the open folder itself where the system has such paths."""
        path = f"/proc/self/fd/{self._descriptor}"
        return path if os.path.isdir(path) else str(self.path)

    def is_still(self, path: str | os.PathLike[str]) -> bool:
        """Whether a path leads to this folder."""
        try:
            there = os.stat(path)
        except OSError:
            return False
        here = os.fstat(self._descriptor)
        return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)

    @contextmanager
    def _within(self, parts: Sequence[str]) -> Iterator[int]:
        """The folder that these names lead to, one below the other."""
        opened: list[int] = []
        try:
            at, shown = self._descriptor, self.path
            for part in parts:
                shown /= part
                mode = os.stat(part, dir_fd=at, follow_symlinks=False).st_mode
                if not stat.S_ISDIR(mode):
                    raise NotPlain(f"{shown} is {kind_of(mode)}, not a folder")
                at = os.open(part, _QUIET | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
                opened.append(at)
            yield at
        finally:
            for descriptor in opened:
                os.close(descriptor)


def read_file(path: str | os.PathLike[str], *, limit: int) -> bytes:
    """The content of a regular file that the caller names, through links if it likes.

    Raises:
        NotPlain: it is a pipe, a device, a folder, or has more than `limit` bytes.
        OSError: it is missing (FileNotFoundError) or cannot be read.
    """
    descriptor = _open_regular(os.fspath(path), None, Path(path), limit, follow=True)
    try:
        return _read(descriptor, Path(path), limit)
    finally:
        os.close(descriptor)


def kind_of(mode: int) -> str:
    """A file's kind in words, from its `st_mode`."""
    kinds = {
        stat.S_IFREG: "a regular file",
        stat.S_IFDIR: "a folder",
        stat.S_IFLNK: "a link",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


def _parts(name: str, folder: Path) -> list[str]:
    parts = name.split("/")
    if "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise NotPlain(f"{name!r} is no name of a file below {folder}")
    return parts


def _open_regular(name: str, at: int | None, shown: Path, limit: int | None, *, follow: bool = False) -> int:
    """Looked at before it is opened, since opening a device may do something; and after, since it may have changed."""
    _require_regular(os.stat(name, dir_fd=at, follow_symlinks=follow), shown, limit)
    descriptor = os.open(name, _QUIET | (0 if follow else os.O_NOFOLLOW), dir_fd=at)
    try:
        _require_regular(os.fstat(descriptor), shown, limit)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _require_regular(found: os.stat_result, shown: Path, limit: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise NotPlain(f"{shown} is {kind_of(found.st_mode)}, not a regular file")
    if limit is not None and found.st_size > limit:
        raise NotPlain(f"{shown} has {found.st_size:,} bytes, and may have {limit:,}")


def _read(descriptor: int, shown: Path, limit: int) -> bytes:
    blocks, left = [], limit + 1  # one more, to see a file that has grown since
    try:
        while left and (block := os.read(descriptor, min(left, _BLOCK))):
            blocks.append(block)
            left -= len(block)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(shown)) from error
    if not left:
        raise NotPlain(f"{shown} has more than the {limit:,} bytes that it may have")
    return b"".join(blocks)


def _require_plain(descriptor: int, shown: Path) -> None:
    for entry in _entries(descriptor):
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            below = os.open(entry.name, _QUIET | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            try:
                _require_plain(below, shown / entry.name)
            finally:
                os.close(below)
        elif not stat.S_ISREG(mode):
            raise NotPlain(f"{shown / entry.name} is {kind_of(mode)}, not a regular file")


def _entries(descriptor: int) -> Iterator["os.DirEntry[str]"]:
    with os.scandir(descriptor) as entries:
        yield from entries
