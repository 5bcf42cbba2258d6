"""What towers of transformers read of the shapes of their pictures, where all that depends on them is given.

A model cuts the features of a pack into pictures by numbers that are data, and puts them together again. These objects
stand in their places: one picture that has all patches, and for attention the ids of the parts beside them.

Legend: P patches of all pictures.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class _Closed:
    """Says nothing but what it was made for. ValueError, for a model of this name, for anything else."""

    name: str

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse(name)

    def _refuse(self, what: str) -> Any:
        raise ValueError(
            f"{self.name}: it reads the shapes of its pictures ({what}) in a way that is not known, so what it "
            "computes of them cannot be made before the step: pictures of this model are not bridged"
        )


@dataclass(frozen=True)
class Patches(_Closed):
    """In the place of the grid of all pictures: how many patches they have together.

    Models cut features by it into pictures, and put them together again. ValueError for anything else.
    """

    count: int

    def prod(self, dim: int) -> "Patches":
        """The same: the number of patches, of one picture that has all."""
        del dim
        return self

    def __floordiv__(self, other: int) -> "Patches":
        return Patches(self.name, self.count // other)

    def tolist(self) -> list[int]:
        """One picture of all patches."""
        return [self.count]

    def __getitem__(self, index: Any) -> Any:
        return self._refuse(f"at {index}")

    def __iter__(self) -> Any:
        return self._refuse("one by one")

    def __len__(self) -> int:
        return int(self._refuse("how many pictures there are"))


@dataclass(frozen=True)
class Parts(_Closed):
    """In the place of the bounds of a pack's parts: their ids, int64 `[P]`.

    A tower takes the difference of its bounds, and cuts what attention reads by the result. ValueError for anything
    else.
    """

    ids_P: Tensor

    def __getitem__(self, index: Any) -> "Parts":
        if index not in (slice(1, None), slice(None, -1)):
            self._refuse(f"bounds at {index}")
        return self

    def __sub__(self, other: "Parts") -> "Parts":
        return self

    def __iter__(self) -> Any:
        return self._refuse("bounds one by one")

    def __len__(self) -> int:
        return int(self._refuse("how many parts there are"))

    def tolist(self) -> "Sizes":
        """One part that has all, which knows of the ids."""
        return Sizes(self.ids_P)


class Sizes(list[int]):
    """The size of one part that has all, by which `ftrain.bridge.places.InPlaces` cuts. `ids_P`: int64 `[P]`."""

    def __init__(self, ids_P: Tensor) -> None:
        super().__init__([len(ids_P)])
        self.ids_P = ids_P
