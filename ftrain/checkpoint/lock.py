"""One writer per folder: a lock that the system releases when its process ends, however it ends."""

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from ftrain.checkpoint.place import Lock

NAME = ".writer"


class WriterLock(Lock):
    """Holds the right to write checkpoints into one folder until `release`, or until the process ends."""

    def __init__(self, root: Path) -> None:
        """Take the lock; ValueError that names the holder when another run has it."""
        self._file: IO[str] = open(root / NAME, "a+", encoding="utf-8")  # noqa: SIM115 (held until release)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ValueError(
                f"{root} is being written by {holder}: two runs cannot share one folder; "
                "stop that run, close its Checkpointer, or save elsewhere"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        """Let others write."""
        self._file.close()
