"""Films by number of frame: what a header tells of them, and the frames with given numbers.

F frames, H and W height and width in pixels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

try:
    import av
except ImportError as absent:
    raise ValueError('films need PyAV: pip install "ftrain-omni[media]"') from absent

from ftrain.data.media.limits import Limits
from ftrain.data.media.opening import media_file, name_of
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place


@dataclass(frozen=True)
class FilmHeader:
    """How many frames a film has, how many a second, and their size, upright."""

    frames: int
    rate: float
    height: int
    width: int


def film_header(source: Any, place: Place, limits: Limits, *, rate: float) -> FilmHeader:
    """What is known of a film from its header and its first frame. `rate`: of a film that is an array.

    BadRow where it is too large or too long, broken, has no pictures, or does not tell how many.
    """
    if isinstance(source, np.ndarray):
        _require_frames(source, place, limits)
        return FilmHeader(len(source), rate, *source.shape[1:3])
    with _opened(source, place, limits) as container:
        stream, name = container.streams.video[0], name_of(source)
        per_second = stream.average_rate or stream.guessed_rate
        count = _told(container, float(per_second or 0.0))
        if count is None and per_second and container.duration:
            count = _counted(source, place, limits)
        if not per_second or not count:
            raise BadRow(place, "broken media", f"{name} does not tell how many frames it has: write it as MP4")
        limits.check("seconds", count / float(per_second), place, name)
        limits.check("pixels", stream.codec_context.width * stream.codec_context.height, place, name)
        first = next(container.decode(video=0), None)
        if first is None:
            raise BadRow(place, "broken media", f"{name} has no frame that can be read")
        turned = round(getattr(first, "rotation", 0) / 90) % 2
        size = (first.width, first.height) if turned else (first.height, first.width)
        return FilmHeader(count, float(per_second), *size)


def frames_at(source: Any, place: Place, limits: Limits, numbers: Sequence[int]) -> np.ndarray:
    """The frames with these numbers, from 0, in rising order: uint8 `[F, H, W, 3]`. Headers may tell of some frames too
    many: the last one is taken for those. BadRow as `film_header`, and for a film that breaks off: it lacks more than
    two frames, and more than one in twenty.
    """
    if isinstance(source, np.ndarray):
        return source[np.minimum(numbers, len(source) - 1)]
    name, found, size = name_of(source), list[np.ndarray](), 0
    limits.check("frames", len(numbers), place, name)
    with _opened(source, place, limits) as container:
        frame = None
        for number, frame in enumerate(container.decode(video=0)):
            wanted = sum(n == number for n in numbers[len(found) :])
            limits.check("pixels", frame.width * frame.height, place, name)
            size += wanted * frame.width * frame.height * 3
            limits.check("decoded_bytes", size, place, name)
            if wanted:
                found += [_array(frame)] * wanted
            if len(found) == len(numbers):
                break
        if frame is None:
            raise BadRow(place, "broken media", f"{name} has no frame that can be read")
        if len(found) < len(numbers) and numbers[-1] - number > max(2, numbers[-1] // 20):
            told = f"{name} breaks off behind frame {number}: its header tells of {numbers[-1] + 1} or more"
            raise BadRow(place, "broken media", told)
        found += [_array(frame)] * (len(numbers) - len(found))
    return np.stack(found)


def _array(frame: Any) -> np.ndarray:
    """A frame upright: phones write films on their side and note the turn, counterclockwise, beside them."""
    array, turns = frame.to_ndarray(format="rgb24"), round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(array, turns)) if turns else array


def _require_frames(array: np.ndarray, place: Place, limits: Limits) -> None:
    limits.check("decoded_bytes", array.nbytes, place, "an array")
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or not len(array):
        what = f"a film of {array.dtype} {array.shape}, not uint8 [frames, height, width, 3]"
        raise BadRow(place, "broken media", what)


@contextmanager
def _opened(source: Any, place: Place, limits: Limits) -> Iterator[Any]:
    """The container of a film. BadRow for what PyAV refuses within the block, and for one without pictures."""
    name = name_of(source)
    try:
        with media_file(source, place, limits) as file, av.open(file, mode="r") as container:
            if not container.streams.video:
                raise BadRow(place, "broken media", f"{name} has no pictures")
            yield container
    except (av.FFmpegError, ValueError, OSError) as error:
        if isinstance(error, BadRow):
            raise
        raise BadRow(place, "broken media", f"{name} is no whole film of a known kind: {error}") from error


def _told(container: Any, per_second: float) -> int | None:
    """How many frames the header tells of; None where it tells only how long pictures and sound are together."""
    stream = container.streams.video[0]
    if stream.frames:
        return int(stream.frames)
    if stream.duration is not None and stream.time_base is not None:
        return max(1, round(float(stream.duration * stream.time_base) * per_second))
    if container.duration is None or len(container.streams) > 1:
        return None
    return max(1, round(container.duration / av.time_base * per_second))


def _counted(source: Any, place: Place, limits: Limits) -> int:
    """How many frames the file holds, none of which is decoded. BadRow for one that ends before its header says."""
    with _opened(source, place, limits) as container:
        count, last, all_of_it = 0, 0.0, container.duration / av.time_base
        limits.check("seconds", all_of_it, place, name_of(source))
        for packet in container.demux():
            count += bool(packet.size) and packet.stream.type == "video"
            if packet.pts is not None:
                last = max(last, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if all_of_it - last > max(0.5, all_of_it / 20):
            told = f"{name_of(source)} breaks off at {last:.1f} s: its header tells of {all_of_it:.1f}"
            raise BadRow(place, "broken media", told)
    return count
