"""What was decoded and may be asked for again, up to a number of bytes; the least recently used goes first."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class ByteCache:
    """Values by key, of at most `limit` bytes together. A value larger than that is returned, and not kept.

    A copy that goes to another process (by pickle) is empty there. Not for several threads at once.

    >>> cache = ByteCache(limit=10)
    >>> cache.get("a", lambda: b"12345678", size=len), cache.get("b", lambda: b"1234", size=len)
    (b'12345678', b'1234')
    >>> cache.bytes, "a" in cache
    (4, False)
    """

    def __init__(self, *, limit: int) -> None:
        """ValueError for a limit below 0."""
        if limit < 0:
            raise ValueError(f"a cache of {limit} bytes: give 0 or more")
        self.limit = limit
        self.bytes = 0
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any], *, size: Callable[[Any], int]) -> Any:
        """The value of `key`: the one that is kept, or a new one of `make`, with `size` of it in bytes."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][0]
        value = make()
        taken = size(value)
        if taken <= self.limit:
            self._kept[key] = (value, taken)
            self.bytes += taken
            while self.bytes > self.limit:
                self.bytes -= self._kept.popitem(last=False)[1][1]
        return value

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.limit, self.bytes, self._kept = state["limit"], 0, OrderedDict()
