"""How a family of models sees media: how many tokens they take, and the arrays that its tower reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ftrain.data.layout import Stream
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Kind, Part, Place


@dataclass(frozen=True)
class Seen:
    """A piece of media, known from its header: the `text` that stands for it where the chat template wrote its mark,
    and the `rows` that each of its arrays will have.
    """

    text: str
    rows: Mapping[str, int]


class MediaFamily(Protocol):
    """How the model of a folder sees media. It travels to worker processes by pickle."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def marks(self) -> Mapping[Kind, str]:
        """By kind of media what the chat template writes for an item; kinds that are not here cannot be read."""

    @property
    def unlearnt(self) -> frozenset[int]:
        """Ids that stand for media, and that begin and end them: never labels."""

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Its kinds of media among tokens."""

    def measure(self, part: Part, place: Place) -> Seen:
        """What a piece of media will be, without decoding it. BadRow where it cannot be read, or is too large."""

    def read(self, part: Part, place: Place, *, decoded: bool = True) -> dict[str, np.ndarray]:
        """Its arrays, by the names of the model's leaves, with as many rows as `measure` said. BadRow likewise.

        `decoded`: False leaves the pixels zero, for who needs shapes alone.
        """

    def arranged(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of rows `[B, L]` with their arrays, as the model takes them."""


@dataclass(frozen=True)
class Blind:
    """How a model sees media whose ways are not known: it reads text alone, and nothing is asked of it."""

    name: str

    @property
    def marks(self) -> Mapping[Kind, str]:
        """None."""
        return {}

    @property
    def unlearnt(self) -> frozenset[int]:
        """None."""
        return frozenset()

    @property
    def streams(self) -> tuple[Stream, ...]:
        """None."""
        return ()

    def measure(self, part: Part, place: Place) -> Seen:
        """BadRow, for any media."""
        raise BadRow(place, "media", f"it has media (of the kind {part.kind}), and how {self.name} sees is not known")

    def read(self, part: Part, place: Place, *, decoded: bool = True) -> dict[str, np.ndarray]:
        """BadRow, for any media."""
        del decoded
        self.measure(part, place)
        return {}

    def arranged(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch."""
        return batch
