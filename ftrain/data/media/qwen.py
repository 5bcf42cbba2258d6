"""How Qwen's vision-language and omni models see, and hear: pictures and films of any size, as patches; recordings.

P patches, C numbers of a patch, n pictures or films.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ftrain.data import media
from ftrain.data.layout import Stream
from ftrain.data.media.family import Seen
from ftrain.data.media.hearing import SOUND, Hearing
from ftrain.data.media.kept import Kept
from ftrain.data.media.limits import Limits
from ftrain.data.media.opening import name_of
from ftrain.data.media.patches import Patches
from ftrain.data.media.sizes import Multiples, MultiplesInTime
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Kind, Part, Place

OMNI = ("qwen2_5_omni", "qwen2_5_omni_thinker", "qwen3_omni_moe", "qwen3_omni_moe_thinker")
"""The model types of configurations of models that hear."""
MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", *OMNI)
"""The model types of configurations."""


@dataclass(frozen=True)
class Films:
    """Which frames of a film are taken, and in which size: at `rate` a second, at least and at most so many.

    `told`: frames are told apart by the seconds at which they are shown, as text (Qwen3-VL, Qwen3.5). `timed`: the
    model takes the seconds between them (Qwen2.5-VL).
    """

    patches: Patches
    size: Multiples | MultiplesInTime
    rate: float = 2.0
    least: int = 4
    most: int = 768
    told: bool = False
    timed: bool = False

    def numbers(self, frames: int, rate: float) -> list[int]:
        """Numbers of the frames that are taken of so many, `rate` of them a second."""
        wanted = min(max(frames / rate * self.rate, self.least), self.most, frames)
        if self.told:
            return np.linspace(0, frames - 1, max(1, int(wanted))).round().astype(int).tolist()
        even = int(wanted // self.patches.in_time * self.patches.in_time)
        return np.arange(0, frames, frames / even).astype(int).tolist() if even else [0]

    def sized(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """Height and width of so many frames. ValueError for a film that is too long for its width."""
        if isinstance(self.size, MultiplesInTime):
            return self.size.of_film(frames, height, width)
        return self.size.size(height, width)


@dataclass(frozen=True)
class QwenFamily:
    """Pictures are of the size that `size` gives them.

    `picture`, `film`: the texts and ids of the tokens that stand for a place of one; `start`, `end`: of those around.
    `quadratic`: what attention in a frame costs the tower (`ftrain.data.layout.Stream`).
    """

    name: str
    patches: Patches
    size: Multiples
    films: Films
    picture: tuple[str, int]
    film: tuple[str, int]
    start: tuple[str, int]
    end: tuple[str, int]
    limits: Limits = Limits()  # noqa: RUF009  # frozen
    kept: Kept = field(default_factory=Kept)
    hearing: Hearing | None = None
    quadratic: float = 0.0

    @property
    def marks(self) -> Mapping[Kind, str]:
        """Pictures, films and recordings; of films whose frames are told apart, with the tokens around."""
        film = self.film[0]
        found: dict[Kind, str] = {"image": self.picture[0], "video": film}
        if self.films.told:
            found["video"] = f"{self.start[0]}{film}{self.end[0]}"
        return found if self.hearing is None else {**found, "audio": self.hearing.place[0]}

    @property
    def unlearnt(self) -> frozenset[int]:
        """Of places, and around them."""
        heard = () if self.hearing is None else (self.hearing.place[1], self.hearing.start[1], self.hearing.end[1])
        return frozenset((self.picture[1], self.film[1], self.start[1], self.end[1], *heard))

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Pictures, then films, whose tokens tell their frames where these are told apart, then recordings."""
        filled = partial(_filled, self.patches, "pixels", "image_grid_thw", False)
        of_films = partial(_filled, self.films.patches, *_FILM, self.films.timed)
        picture = Stream(self.picture[1], 1, filled, quadratic=self.quadratic)
        heard = [] if self.hearing is None else [Stream(self.hearing.place[1], 1, self.hearing.filled, heard=True)]
        if self.films.told or not isinstance(self.films.size, Multiples):
            return picture, Stream(self.film[1], 1, of_films, quadratic=self.quadratic), *heard
        most = self.films.size.most_pixels // self.films.size.factor**2
        return picture, Stream(self.film[1], 1, of_films, piece=most), *heard

    def measure(self, part: Part, place: Place) -> Seen:
        """The tokens of a picture, a film or a recording, from its header. BadRow where it cannot be read, or is too
        large.
        """
        if part.kind == "audio" and self.hearing is not None:
            return self.hearing.measure(part, place)
        if part.kind == "image":
            grid = self.patches.grid(1, *self._picture_size(part, place))
            rows = {"pixels": grid[1] * grid[2], "image_grid_thw": 1}
            return Seen(self.picture[0] * self.patches.tokens(grid), rows)
        header = self._header(part, place)
        numbers = self.films.numbers(header.frames, header.rate)
        grid = self.films.patches.grid(len(numbers), *self._film_size(part, place))
        rows = dict.fromkeys(("second_per_grid_ts",) if self.films.timed else (), 1)
        rows |= {_FILM[0]: grid[0] * grid[1] * grid[2], _FILM[1]: 1}
        if not part.sound:
            return Seen(self._told(numbers, header.rate, grid), rows)
        hearing = self._hears(part, place)
        heard = hearing.measure(Part("audio", source=part.source), place)
        each, step = self.films.patches.tokens((1, *grid[1:])), self._step(numbers, header)
        text = hearing.beside(self.film[0], (np.arange(grid[0]) * step).repeat(each), heard)
        return Seen(text, {**rows, **heard.rows})

    def read(self, part: Part, place: Place, *, decoded: bool = True) -> dict[str, np.ndarray]:
        """`pixels` float32 `[P, C]` and `image_grid_thw` int64 `[1, 3]`; of a film `pixel_values_videos` and
        `video_grid_thw`, and where a model takes it `second_per_grid_ts` float32 `[1]`; of a recording, and of a film
        that is heard, as `ftrain.data.media.hearing`. Patches are zeros if not `decoded`. BadRow as `measure`.
        """
        if part.kind == "audio" and self.hearing is not None:
            return self.hearing.read(part, place, decoded=decoded)
        if part.kind == "image":
            height, width = self._picture_size(part, place)
            grid = self.patches.grid(1, height, width)
            found = {"image_grid_thw": np.array([grid], np.int64)}
            if not decoded:
                return {"pixels": _zeros(self.patches, grid), **found}
            image = self.kept.array(part, place, lambda: self._picture(part, place, height, width))
            return {"pixels": self.patches(image[None]), **found}
        header, (height, width) = self._header(part, place), self._film_size(part, place)
        numbers = self.films.numbers(header.frames, header.rate)
        grid = self.films.patches.grid(len(numbers), height, width)
        found = {_FILM[1]: np.array([grid], np.int64)}
        if self.films.timed:
            found["second_per_grid_ts"] = np.array([self._step(numbers, header)], np.float32)
        if part.sound:
            sound = Part("audio", source=part.source)
            found |= self._hears(part, place).read(sound, place, decoded=decoded)
        if not decoded:
            return {_FILM[0]: _zeros(self.films.patches, grid), **found}
        frames = self.kept.array(part, place, lambda: self._frames(part, place, numbers, height, width))
        return {_FILM[0]: self.films.patches(frames), **found}

    def arranged(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch. ValueError for recordings in rows, which no bridged model takes."""
        if SOUND in batch:
            raise ValueError(
                f"recordings for {self.name} as transformers has it, which takes rows: train the library's own model "
                "of the folder (native auto, not never)"
            )
        return batch

    def _hears(self, part: Part, place: Place) -> Hearing:
        if self.hearing is None:
            raise BadRow(
                place, "media", f"{name_of(part.source)} is to be heard (audio: true), and {self.name} is deaf"
            )
        return self.hearing

    def _step(self, numbers: list[int], header: Any) -> float:
        """Seconds from one patch in time to the next."""
        return float(self.films.patches.in_time / (len(numbers) / header.frames * header.rate))

    def _picture_size(self, part: Part, place: Place) -> tuple[int, int]:
        size = self.kept.header(part, place, lambda: media.images.image_size(part.source, place, self.limits))
        return _by_rule(self.size.size, size, part, place)

    def _film_size(self, part: Part, place: Place) -> tuple[int, int]:
        header = self._header(part, place)
        frames = len(self.films.numbers(header.frames, header.rate))
        return _by_rule(partial(self.films.sized, frames), (header.height, header.width), part, place)

    def _header(self, part: Part, place: Place) -> Any:
        rate = self.films.rate
        return self.kept.header(
            part, place, lambda: media.film_frames.film_header(part.source, place, self.limits, rate=rate)
        )

    def _picture(self, part: Part, place: Place, height: int, width: int) -> np.ndarray:
        image = media.images.read_image(part.source, place, self.limits)
        if _by_rule(self.size.size, image.shape[:2], part, place) != (height, width):
            raise BadRow(place, "broken media", f"{name_of(part.source)} is of another size than its header tells")
        return media.images.resized(image, height, width)

    def _frames(self, part: Part, place: Place, numbers: list[int], height: int, width: int) -> np.ndarray:
        frames = media.film_frames.frames_at(part.source, place, self.limits, numbers)
        return np.stack([media.images.resized(frame, height, width) for frame in frames])

    def _told(self, numbers: list[int], rate: float, grid: tuple[int, int, int]) -> str:
        """The text of a film: its tokens, or those of each patch in time behind the mean of its seconds."""
        tokens = self.films.patches.tokens(grid)
        if not self.films.told:
            return self.film[0] * tokens
        in_time = self.films.patches.in_time
        numbers = [*numbers, *numbers[-1:] * (-len(numbers) % in_time)]
        seconds = [(numbers[i] / rate + numbers[i + in_time - 1] / rate) / 2 for i in range(0, len(numbers), in_time)]
        frame = self.start[0] + self.film[0] * (tokens // grid[0]) + self.end[0]
        return "".join(f"<{second:.1f} seconds>{frame}" for second in seconds)


_FILM = ("pixel_values_videos", "video_grid_thw")


def _by_rule(rule: object, size: tuple[int, ...], part: Part, place: Place) -> tuple[int, int]:
    try:
        found: tuple[int, int] = rule(*size)  # type: ignore[operator]
    except ValueError as error:
        raise BadRow(place, "media of this shape", f"{name_of(part.source)}: {error}") from error
    return found


def _zeros(patches: Patches, grid: tuple[int, int, int]) -> np.ndarray:
    return np.zeros((grid[0] * grid[1] * grid[2], patches.numbers), np.float32)


def _filled(patches: Patches, pixels: str, grid: str, timed: bool, tokens: int) -> dict[str, np.ndarray]:
    """A black strip of so many tokens."""
    count = tokens * patches.merge**2
    found = {pixels: np.zeros((count, patches.numbers), np.float32)}
    found[grid] = np.array([[1, patches.merge, patches.merge * tokens]], np.int64)
    return found | ({"second_per_grid_ts": np.ones(1, np.float32)} if timed else {})
