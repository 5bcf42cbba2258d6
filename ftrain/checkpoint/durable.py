"""Files that survive a crash of the machine: written, synced, and only then given their name."""

import contextlib
import ctypes
import errno
import logging
import os
import re
import shutil
from pathlib import Path

from ftrain.checkpoint.folders import discarded, is_discarded, put_aside, temporary

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_log = logging.getLogger("ftrain.checkpoint")
_UNFINISHED = re.compile(r".+\.tmp-[0-9a-f]+")


def sync_path(path: Path) -> None:
    """Block until the file, or the names in the folder, are on the disk. OSError if it cannot be opened or synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Sync every file below `root`, and every folder after what it holds."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            sync_path(Path(folder, name))
        sync_path(Path(folder))


def make_folder(path: Path) -> None:
    """Create a folder and its parents, whose names survive a crash. OSError where it cannot be made."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_path(folder.parent)


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8. Raises OSError as it does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Give `path` this content at once: a reader sees the old one or the new one, also after a crash.

    Raises:
        OSError: it cannot be written; the old content stays.
    """
    new = temporary(path)
    try:
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):  # it would hide the error that led here
            new.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def is_leftover(path: Path) -> bool:
    """Whether it has the name of a file that `write_bytes` has not finished."""
    return _UNFINISHED.fullmatch(path.name) is not None


def publish(made: Path, final: Path) -> None:
    """Rename the synced folder `made` to `final`, replacing one that is there in a single step where the OS can.

    Where it cannot, the old one is put aside first, under a name by which it still counts: see `LocalFolder`.

    Raises:
        OSError: a name cannot be changed; `final` is then the old folder, put aside or not.
    """
    if not os.path.lexists(final):
        os.rename(made, final)
    elif _exchange(made, final):
        sync_path(final.parent)
        _remove_old(made)
    else:
        old = put_aside(final)
        os.rename(final, old)
        sync_path(final.parent)
        os.rename(made, final)
        sync_path(final.parent)
        _remove_old(old)
    sync_path(final.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder such that its name is gone before the first of its files is; of a link only the link, and what
    is no folder as it is.

    Raises:
        OSError: something below it cannot be deleted. Its name is gone even so, but where that could not be changed.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        sync_path(path.parent)
        return
    gone = path if is_discarded(path) else discarded(path)
    if gone != path:
        os.rename(path, gone)
        sync_path(path.parent)
    shutil.rmtree(gone)


def _remove_old(path: Path) -> None:
    """What has been replaced: the new version has its name, whatever becomes of this one."""
    try:
        remove_folder(path)
    except OSError as error:
        _log.warning("%s, an old version of a step, could not be removed: %s", path, error)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names atomically with Linux' renameat2; False where the system or file system cannot."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(a), None, str(b))
