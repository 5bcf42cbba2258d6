"""Rows that are appended to a file during a run. A full disk does not end the run: rows wait in memory."""

import contextlib
import logging
import os
from pathlib import Path

_log = logging.getLogger("ftrain.run")


class RowLog:
    """Lines of a file, appended whole. What cannot be written is kept, and written with a later line."""

    def __init__(self, file: Path) -> None:
        """Continue at the end of the file, which is created if it does not exist. OSError where that fails."""
        self._file = file
        self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._end = os.fstat(self._descriptor).st_size
        self._waiting: list[bytes] = []

    def append(self, line: str) -> None:
        """Append a line. It is in the file when this returns, unless the disk refuses it."""
        self._waiting.append(line.encode())
        self._write()

    def sync(self) -> None:
        """Flush all lines to the disk, as far as it takes them."""
        self._write()
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._say(error)

    def close(self) -> None:
        """Write what waits, if possible, and close the file; lines that are lost are logged."""
        self._write()
        if self._waiting:
            _log.warning("%s lacks its last %d lines, which the disk did not take", self._file, len(self._waiting))
        os.close(self._descriptor)

    def _write(self) -> None:
        data = b"".join(self._waiting)
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # a torn line would be in the middle of the file once there is space
                os.ftruncate(self._descriptor, self._end)
            if len(self._waiting) == 1:
                self._say(error)
        else:
            self._end += len(data)
            self._waiting = []

    def _say(self, error: OSError) -> None:
        _log.warning("%s cannot be written (%s): its lines wait in memory", self._file, error.strerror)
