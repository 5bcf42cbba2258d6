"""What was read of media and may be asked for again, by several threads: headers and arrays, up to some bytes."""

from collections.abc import Callable
from threading import Lock
from typing import Any

import numpy as np

from ftrain.data.cache import ByteCache
from ftrain.data.media.opening import path_of
from ftrain.data.sample import Part, Place

_HEADER = 200  # bytes that one takes, about


class Kept:
    """Headers and arrays of files by their paths; what stands in rows is not kept. A copy in another process is empty.

    Args:
        bytes: of arrays. Headers take a sixteenth of it more.
    """

    def __init__(self, bytes: int = 256 * 2**20) -> None:
        self._bytes = bytes
        self._arrays, self._headers = ByteCache(limit=bytes), ByteCache(limit=bytes // 16)
        self._lock = Lock()

    def array(self, part: Part, place: Place, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array of a file, or a new one of `make`, of any shape."""
        found: np.ndarray = self._get(self._arrays, part, place, make, lambda array: array.nbytes)
        return found

    def header(self, part: Part, place: Place, make: Callable[[], Any]) -> Any:
        """What is known of a file from its header, or what `make` gives."""
        return self._get(self._headers, part, place, make, lambda header: _HEADER)

    def _get(self, cache: ByteCache, part: Part, place: Place, make: Callable[[], Any], size: Any) -> Any:
        path = path_of(part.source, place)
        if path is None:
            return make()
        with self._lock:
            if (part.kind, path) in cache:
                return cache.get((part.kind, path), make, size=size)
        made = make()  # not within the lock: others decode beside it
        with self._lock:
            return cache.get((part.kind, path), lambda: made, size=size)

    def __getstate__(self) -> dict[str, Any]:
        return {"bytes": self._bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Kept.__init__(self, state["bytes"])
