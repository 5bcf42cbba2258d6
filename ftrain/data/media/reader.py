"""`MediaReader`: the arrays of parts of media, with limits, and kept while there is room."""

from typing import Any

import numpy as np

from ftrain.data import media
from ftrain.data.cache import ByteCache
from ftrain.data.media.limits import Limits
from ftrain.data.media.opening import path_of
from ftrain.data.media.sizes import SizeRule
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Part, Place


class MediaReader:
    """Reads media for one model. In worker processes each has its own, with an empty cache.

    Args:
        limits: the most that is decoded.
        cache_bytes: arrays of files are kept up to this many bytes; what stands in rows is not.
        image_size: the rule by which pictures and frames get their size; None leaves theirs.
        audio_rate: samples a second of recordings.
        video_rate: frames a second of films.
        video_frames: at most this many frames of a film.
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        cache_bytes: int = 256 * 2**20,
        image_size: SizeRule | None = None,
        audio_rate: int = 16_000,
        video_rate: float = 2.0,
        video_frames: int | None = 768,
    ) -> None:
        self.limits = limits or Limits()
        self.image_size, self.audio_rate = image_size, audio_rate
        self.video_rate, self.video_frames = video_rate, video_frames
        self._cache = ByteCache(limit=cache_bytes)

    def image(self, part: Part, place: Place) -> np.ndarray:
        """A picture, uint8 `[height, width, 3]`. BadRow where it cannot be read, or is too large."""
        found: np.ndarray = self._kept(part, place, lambda: self._image(part.source, place), lambda a: a.nbytes)
        return found

    def audio(self, part: Part, place: Place) -> np.ndarray:
        """A recording, float32 `[samples]`. BadRow where it cannot be read, or is too long."""
        found: np.ndarray = self._kept(
            part,
            place,
            lambda: media.audio.read_audio(part.source, place, self.limits, rate=self.audio_rate),
            lambda a: a.nbytes,
        )
        return found

    def video(self, part: Part, place: Place) -> Any:
        """A film, `ftrain.data.media.video.Film`. BadRow where it cannot be read, or is too long."""
        return self._kept(part, place, lambda: self._video(part.source, place), lambda film: film.frames.nbytes)

    def read(self, part: Part, place: Place) -> Any:
        """A part of any kind but text. BadRow as above, and for a part of text."""
        readers = {"image": self.image, "audio": self.audio, "video": self.video}
        if part.kind not in readers:
            raise BadRow(place, "no media", f"a part of {part.kind} is read as media")
        return readers[part.kind](part, place)

    def _kept(self, part: Part, place: Place, make: Any, size: Any) -> Any:
        path = path_of(part.source, place)
        return make() if path is None else self._cache.get((part.kind, path), make, size=size)

    def _image(self, source: Any, place: Place) -> np.ndarray:
        return self._sized(media.images.read_image(source, place, self.limits), place)

    def _video(self, source: Any, place: Place) -> Any:
        film = media.video.read_video(source, place, self.limits, rate=self.video_rate, most_frames=self.video_frames)
        if self.image_size is None:
            return film
        return media.video.Film(np.stack([self._sized(frame, place) for frame in film.frames]), film.times)

    def _sized(self, image: np.ndarray, place: Place) -> np.ndarray:
        if self.image_size is None:
            return image
        try:
            height, width = self.image_size.size(*image.shape[:2])
        except ValueError as error:
            raise BadRow(place, "media of this shape", str(error)) from error
        sized: np.ndarray = media.images.resized(image, height, width)
        return sized
