"""How models see whose pictures are tiles of one size, each of equally many tokens: LLaVA, Gemma-3, InternVL, SmolVLM.

Tiles are made by the image processor of transformers that the model's folder names.

Legend: n tiles, H and W height and width of a tile in pixels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from ftrain.data import media
from ftrain.data.layout import Stream
from ftrain.data.media.family import Seen
from ftrain.data.media.kept import Kept
from ftrain.data.media.limits import Limits
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Kind, Part, Place

Cut = Callable[[int, int], tuple[int, str]]
"""From the height and width of a picture to how many tiles it becomes, and the text that stands for it."""


@dataclass(frozen=True)
class TileFamily:
    """Pictures as tiles.

    Args:
        name: for messages.
        process: an image processor of transformers.
        cut: into how many tiles.
        mark: what the chat template writes for a picture.
        token: the id that stands for a place of a tile.
        around: ids that begin and end pictures.
        unit: tokens of a tile.
        size: H and W.
        kinds: the model's leaf that tells tokens of pictures from others, 1 and 0, of the tokens' shape; "" for none.
        by_rows: the model takes tiles as `[B, n, 3, H, W]`.
        limits: the most that is decoded.
    """

    name: str
    process: Any
    cut: Cut
    mark: str
    token: int
    around: tuple[int, ...]
    unit: int
    size: tuple[int, int]
    kinds: str = ""
    by_rows: bool = False
    limits: Limits = Limits()  # noqa: RUF009  # frozen
    kept: Kept = field(default_factory=Kept)

    @property
    def marks(self) -> Mapping[Kind, str]:
        """Pictures alone."""
        return {"image": self.mark}

    @property
    def unlearnt(self) -> frozenset[int]:
        """Of places, and around them."""
        return frozenset((self.token, *self.around))

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Pictures."""
        return (Stream(self.token, self.unit, partial(_filled, self.unit, self.size)),)

    def measure(self, part: Part, place: Place) -> Seen:
        """The tokens of a picture, from its header. BadRow where it cannot be read, or is too large."""
        tiles, text = self.kept.header(part, place, lambda: self._cut(part, place))
        return Seen(text, {"pixels": tiles})

    def read(self, part: Part, place: Place, *, decoded: bool = True) -> dict[str, np.ndarray]:
        """`pixels` float32 `[n, 3, H, W]`, zeros if not `decoded`. BadRow as `measure`."""
        if not decoded:
            return {"pixels": np.zeros((self.measure(part, place).rows["pixels"], 3, *self.size), np.float32)}
        return {"pixels": self.kept.array(part, place, lambda: self._tiles(part, place))}

    def arranged(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of rows `[B, L]`, with the leaves as the model takes them."""
        found = dict(batch)
        if self.kinds:
            found[self.kinds] = (batch["tokens"] == self.token).long()
        if self.by_rows and "pixels" in found:
            found["pixels"] = found["pixels"].unflatten(0, (len(batch["tokens"]), -1))
        return found

    def _cut(self, part: Part, place: Place) -> tuple[int, str]:
        height, width = media.images.image_size(part.source, place, self.limits)
        try:
            return self.cut(height, width)
        except (ValueError, ZeroDivisionError) as error:
            raise BadRow(place, "media of this shape", f"a picture of {height} x {width}: {error}") from error

    def _tiles(self, part: Part, place: Place) -> np.ndarray:
        image = media.images.read_image(part.source, place, self.limits)
        return tiles_of(self.process, image)


def tiles_of(process: Any, image: np.ndarray) -> np.ndarray:
    """What an image processor of transformers makes of a picture uint8 `[h, w, 3]`: float32 `[n, 3, H, W]`."""
    found = process(images=[image], input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    return np.ascontiguousarray(found.reshape(-1, *found.shape[-3:]).to(torch.float32).numpy())


def blank(height: int, width: int) -> np.ndarray:
    """A grey picture, uint8 `[height, width, 3]`."""
    return np.full((height, width, 3), 128, np.uint8)


def whole(text: str, height: int, width: int) -> tuple[int, str]:
    """A `Cut` into one tile, for which `text` stands."""
    del height, width
    return 1, text


@dataclass(frozen=True)
class InternCut:
    """InternVL's: tiles that keep the picture's shape, and one of all of it."""

    process: Any
    start: str
    token: str
    end: str
    unit: int

    def __call__(self, height: int, width: int) -> tuple[int, str]:
        """As `Cut`. ValueError as the processor's."""
        tiles = int(self.process.get_number_of_image_patches(height, width, {}))
        return tiles, f"{self.start}{self.token * self.unit * tiles}{self.end}"


@dataclass(frozen=True)
class SmolCut:
    """SmolVLM's and Idefics3's: tiles in rows and columns, told apart by text, and one of all of the picture.

    `edge`: the token around pictures; `whole`: the one before the tile of all of it.
    """

    process: Any
    edge: str
    token: str
    whole: str
    unit: int

    def __call__(self, height: int, width: int) -> tuple[int, str]:
        """As `Cut`: the processor is asked with a blank picture. ValueError as the processor's."""
        told = self.process(
            images=[blank(height, width)], input_data_format="channels_last", return_row_col_info=True,
            return_tensors="pt",
        )  # fmt: skip
        rows, columns = int(told["rows"][0][0]), int(told["cols"][0][0])
        tile = self.token * self.unit
        lines = [
            "".join(f"{self.edge}<row_{row + 1}_col_{column + 1}>{tile}" for column in range(columns)) + "\n"
            for row in range(rows)
        ]
        text = "".join(lines) + ("\n" if rows else "") + f"{self.edge}{self.whole}{tile}{self.edge}"
        return rows * columns + 1, text


def _filled(unit: int, size: tuple[int, int], tokens: int) -> dict[str, np.ndarray]:
    """Even tiles, which are not zero: models leave those out."""
    return {"pixels": np.ones((tokens // unit, 3, *size), np.float32)}
