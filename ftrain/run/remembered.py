"""An encoder that remembers rows: those that are counted before a run are not tokenised again when they are read."""

from dataclasses import dataclass, field
from typing import Any

from ftrain.data.documents import Group
from ftrain.data.rejects import BadRow
from ftrain.run.data import RowEncoder

_ROWS, _TOKENS = 4096, 2**21  # some 32 MiB: memory does not grow with the data


@dataclass(frozen=True, eq=False)
class Remembered:
    """`encode`, of whose first rows what they became is kept, up to a bound; a row is known by what it says.

    Other processes begin without what this one remembers.
    """

    encode: RowEncoder
    _kept: dict[Any, tuple[Any, Group | BadRow]] = field(default_factory=dict, repr=False)
    _tokens: list[int] = field(default_factory=lambda: [0], repr=False)

    @property
    def takes(self) -> tuple[type, ...]:
        """The kinds of samples that it takes."""
        return self.encode.takes

    def __call__(self, sample: Any) -> Group:
        """The documents of a row. BadRow as `encode` raises it."""
        place = _place(sample)
        known = self._kept.get(place)
        if known is not None and _same(known[0], sample):
            found = known[1]
        else:
            found = self._encoded(sample)
            self._keep(place, sample, found)
        if isinstance(found, BadRow):
            raise found
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return Remembered, (self.encode,)

    def _encoded(self, sample: Any) -> Group | BadRow:
        try:
            return self.encode(sample)
        except BadRow as error:
            return error

    def _keep(self, place: Any, sample: Any, found: Group | BadRow) -> None:
        size = len(found) if isinstance(found, Group) else 0
        if (
            place is not None
            and not _has_media(sample)
            and len(self._kept) < _ROWS
            and self._tokens[0] + size <= _TOKENS
        ):
            self._kept[place] = (sample, found)
            self._tokens[0] += size


def _place(sample: Any) -> Any:
    if isinstance(sample, tuple):
        return tuple(map(_place, sample))
    return getattr(sample, "place", None)


def _has_media(sample: Any) -> bool:
    """Whether a sample holds pictures or the like, which would take much memory."""
    if isinstance(sample, tuple):
        return any(map(_has_media, sample))
    said = (getattr(sample, name, ()) for name in ("messages", "prompt", "chosen", "rejected", "completion"))
    return hasattr(sample, "media") or any(message.media for messages in said for message in messages)


def _same(one: Any, other: Any) -> bool:
    """Whether two samples say the same; arrays are not compared, and are encoded again."""
    try:
        return bool(one == other)
    except ValueError:
        return False
