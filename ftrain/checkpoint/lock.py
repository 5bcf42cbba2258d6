"""One writer per folder: a lock that the system releases when its process ends, however it ends."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import weakref
from collections.abc import Callable
from pathlib import Path

from ftrain.checkpoint.store import Lock

NAME = ".writer"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
_log = logging.getLogger("ftrain.checkpoint")


class WriterLock(Lock):
    """Holds the right to write into one folder until `release`, or until the process ends.

    Processes that this one has forked (the workers of a loader, say) do not hold it. On a file system that knows no
    locks nothing is held, which is said.
    """

    def __init__(self, root: Path) -> None:
        """Take the lock.

        Raises:
            ValueError: another run has it; it is named.
            OSError: the file cannot be made or written; it is named.
        """
        self._path = root / NAME
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        os.register_at_fork(after_in_child=_closer(weakref.ref(self)))
        try:
            self._take(root)
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except OSError as error:
            self.release()
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        except BaseException:
            self.release()  # a kept traceback would keep the file open, and with it the lock
            raise

    def _take(self, root: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._file, 200, 0).decode(errors="replace").strip() or "another process"
            raise ValueError(
                f"{root} is being written by {holder}: two runs cannot share one folder; "
                "stop that run, close its Checkpointer, or save elsewhere"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _log.warning(
                "%s is on a file system without locks (%s): see to it that no second run writes into it",
                root,
                error.strerror,
            )

    def is_held(self) -> bool:
        """False when the file is gone, or is another one: then somebody else may have taken the lock of that."""
        try:
            here, there = os.fstat(self._file), os.stat(self._path, follow_symlinks=False)
        except OSError:
            return False
        return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)

    def release(self) -> None:
        """Let others write."""
        if self._file >= 0:
            # Closing alone would leave the lock with a process that was forked while it was taken.
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)
            self._forget()

    def _forget(self) -> None:
        """Close the file; of a forked process, whose lock it is not."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _closer(held: "weakref.ref[WriterLock]") -> Callable[[], None]:
    def close() -> None:
        lock = held()
        if lock is not None:
            lock._forget()

    return close
