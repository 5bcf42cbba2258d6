"""One writer per folder: a lock that the system releases when its process ends, however it ends."""

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path

from ftrain.checkpoint.place import Lock

NAME = ".writer"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
_log = logging.getLogger("ftrain.checkpoint")


class WriterLock(Lock):
    """Holds the right to write into one folder until `release`, or until the process ends.

    On a file system that knows no locks nothing is held, which is said.
    """

    def __init__(self, root: Path) -> None:
        """Take the lock; ValueError that names the holder when another run has it. OSError."""
        self._file = os.open(root / NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            self._take(root)
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
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

    def release(self) -> None:
        """Let others write."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
