"""Reads the media of documents when their turn comes, in the process that trains on them."""

from dataclasses import dataclass, replace

import numpy as np

from ftrain.data.documents import Document, Group
from ftrain.data.media.family import MediaFamily
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Part, Place


@dataclass(frozen=True)
class ReadMedia:
    """A `Finish` of the loader: documents with the arrays of their `parts`, by the `family` of the model. `decoded`:
    False for documents that another process trains on, of which the shapes are needed alone.
    """

    family: MediaFamily
    decoded: bool = True

    def __call__(self, group: Group) -> Group:
        """The group with arrays of media. BadRow where one cannot be read, or is not what its header told."""
        if not any(document.parts for document in group.documents):
            return group
        # a list first: a tuple that a thread makes of a generator breaks where another thread asks gc for all objects
        read = [self._read(document) for document in group.documents]
        return replace(group, documents=tuple(read))

    def _read(self, document: Document) -> Document:
        found: dict[str, list[np.ndarray]] = {}
        for part, place in document.parts:
            told, arrays = self.family.measure(part, place).rows, self._arrays(part, place)
            rows = {name: len(array) for name, array in arrays.items()}
            if rows != dict(told):
                raise BadRow(
                    place, "broken media", f"its {part.kind} has {rows} rows, and its header told {dict(told)}"
                )
            for name, array in arrays.items():
                found.setdefault(name, []).append(array)
        read = {name: np.concatenate(arrays) for name, arrays in found.items()}
        return replace(document, media={**document.media, **read})

    def _arrays(self, part: Part, place: Place) -> dict[str, np.ndarray]:
        return self.family.read(part, place, decoded=self.decoded)
