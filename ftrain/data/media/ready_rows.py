"""How a model sees media whose rows its towers made before: the same tokens, and rows in the place of pixels and sound.

R rows of a token (one, and one for each deep layer), V their width, n tokens of a piece of media.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ftrain.data.layout import Stream
from ftrain.data.media.family import Seen
from ftrain.data.media.opening import name_of, path_of
from ftrain.data.media.qwen import QwenFamily
from ftrain.data.media.row_cache import RowCache, key_of
from ftrain.data.sample import Kind, Part, Place
from ftrain.modules.pictures import PIXELS, ROWS
from ftrain.modules.sounds import ROWS as SOUND_ROWS
from ftrain.modules.sounds import SOUND

READ: Mapping[str, str] = {**{PIXELS[kind]: ROWS[kind] for kind in ROWS}, SOUND: SOUND_ROWS}
"""By what a tower reads the leaf of what it makes of it."""


@dataclass(frozen=True)
class ReadyRows:
    """A `MediaFamily` of the models that `family` is of, whose media are in the `cache`. `width`: by what a tower reads
    the dims of a row behind the first, `(R, V)` or `(V,)`.
    """

    family: QwenFamily
    cache: RowCache
    width: Mapping[str, tuple[int, ...]]
    _keys: dict[tuple[str, bool, str], str] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """That of the family."""
        return self.family.name

    @property
    def marks(self) -> Mapping[Kind, str]:
        """Those of the family."""
        return self.family.marks

    @property
    def unlearnt(self) -> frozenset[int]:
        """Those of the family."""
        return self.family.unlearnt

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Those of the family, of which nothing is computed but what each token costs."""
        return tuple(replace(stream, quadratic=0.0) for stream in self.family.streams)

    def measure(self, part: Part, place: Place) -> Seen:
        """The same text, and rows for each token. BadRow as the family."""
        seen = self.family.measure(part, place)
        counts = {leaf: seen.text.count(text) for leaf, text in self._texts.items()}
        rows = {READ.get(name, name): counts.get(name, count) for name, count in seen.rows.items()}
        return Seen(seen.text, rows)

    def read(self, part: Part, place: Place, *, decoded: bool = True) -> dict[str, np.ndarray]:
        """What the family reads beside pixels and sound, and rows float32: "image_rows" and "video_rows" `[n, R, V]`,
        "sound_rows" `[n, V]`; zeros if not `decoded`.

        BadRow as the family; ValueError for media that are not in the cache.
        """
        found = self.family.read(part, place, decoded=False)
        told = self.measure(part, place).rows
        kept = {name: array for name, array in found.items() if name not in READ}
        if not decoded:
            shapes = {READ[name]: (told[READ[name]], *self.width[name]) for name in found if name in READ}
            return kept | {leaf: np.zeros(shape, np.float32) for leaf, shape in shapes.items()}
        key = self.key(part, place)
        if key not in self.cache:
            self.family.read(part, place)  # says why it is not
            raise ValueError(f"{place}: {name_of(part.source)} is not in {self.cache.folder}: begin the run again")
        rows = {leaf: x.float().numpy() for leaf, x in self.cache.read(key).items()}
        if {leaf: len(x) for leaf, x in rows.items()} != {
            leaf: count for leaf, count in told.items() if leaf not in kept
        }:
            name = name_of(part.source)
            raise ValueError(f"{place}: {self.cache.folder} has other rows of {name}: give a new folder")
        return kept | rows

    def key(self, part: Part, place: Place) -> str:
        """Its key in the cache; that of a file is found once. BadRow where it cannot be read."""
        path = path_of(part.source, place)
        if path is None:
            return key_of(part, place, self.family.limits)
        if (part.kind, part.sound, path) not in self._keys:
            self._keys[part.kind, part.sound, path] = key_of(part, place, self.family.limits)
        return self._keys[part.kind, part.sound, path]

    def tokens(self, name: str) -> int:
        """The id of the tokens that stand for what a tower reads as the leaf `name`."""
        return dict(self._places)[self._texts[name]]

    def arranged(self, batch: dict[str, Any]) -> dict[str, Any]:
        """That of the family."""
        return self.family.arranged(batch)

    @property
    def _places(self) -> tuple[tuple[str, int], ...]:
        heard = () if self.family.hearing is None else (self.family.hearing.place,)
        return (self.family.picture, self.family.film, *heard)

    @property
    def _texts(self) -> dict[str, str]:
        names = (PIXELS["image"], PIXELS["video"], SOUND)
        return {name: text for name, (text, _) in zip(names, self._places, strict=False)}
