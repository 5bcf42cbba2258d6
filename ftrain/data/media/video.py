"""Films by PyAV: frames at a rate, upright.

F frames, H and W height and width in pixels.
"""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

try:
    import av
except ImportError as absent:
    raise ValueError('films need PyAV: pip install "ftrain-omni[media]"') from absent

from ftrain.data.media.limits import Limits
from ftrain.data.media.opening import media_bytes, name_of
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place


@dataclass(frozen=True, eq=False)
class Film:
    """`frames` uint8 `[F, H, W, 3]`, and `times` float64 `[F]`, the seconds at which they are shown."""

    frames: np.ndarray
    times: np.ndarray


def read_video(source: Any, place: Place, limits: Limits, *, rate: float, most_frames: int | None = None) -> Film:
    """The frames of a film that are shown at 0, 1 / rate, 2 / rate, ... seconds.

    Args:
        source: a path, the bytes of a file, or an array uint8 [F, H, W, 3], taken as frames at `rate`.
        place: of the row, for errors and for relative paths.
        limits: the most that is decoded.
        rate: frames a second; a film with fewer shows each of its frames once.
        most_frames: of a longer film as many frames are taken, at equal distances.

    BadRow where it is too large or too long (which is seen before it is decoded, where its header tells the truth, and
    at the latest when the limit is reached), broken, or has no pictures.
    """
    if isinstance(source, np.ndarray):
        limits.check("decoded_bytes", source.nbytes, place, "an array")
        return Film(source, np.arange(len(source)) / rate)
    name = name_of(source)
    try:
        with av.open(io.BytesIO(media_bytes(source, place, limits))) as container:
            if not container.streams.video:
                raise BadRow(place, "broken media", f"{name} has no pictures")
            wanted = _wanted(container, place, limits, name, rate, most_frames)
            found = list(_taken(container, wanted, place, limits, name))
    except (av.FFmpegError, ValueError, OSError) as error:
        if isinstance(error, BadRow):
            raise
        raise BadRow(place, "broken media", f"{name} is no whole film of a known kind: {error}") from error
    if not found:
        raise BadRow(place, "broken media", f"{name} has no frame that can be read")
    return Film(np.stack([frame for frame, _ in found]), np.array([time for _, time in found]))


def seconds_of(container: Any) -> float | None:
    """How long a film is, as its container tells; None where it does not."""
    stream = container.streams.video[0]
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / av.time_base


def _wanted(
    container: Any, place: Place, limits: Limits, name: str, rate: float, most_frames: int | None
) -> Iterator[float]:
    """The times at which frames are taken, from the header; without a length in it as many as are there."""
    stream, seconds = container.streams.video[0], seconds_of(container)
    pixels = stream.codec_context.width * stream.codec_context.height
    limits.check("pixels", pixels, place, name)
    step = 1.0 / rate
    if seconds is not None:
        limits.check("seconds", seconds, place, name)
        if most_frames is not None and seconds * rate > most_frames:
            step = seconds / most_frames
        frames = min(math.ceil(seconds / step - 1e-9), most_frames or limits.frames + 1)
        limits.check("frames", frames, place, name)
        limits.check("decoded_bytes", frames * pixels * 3, place, name)
    index = 0
    times = []
    while seconds is not None and index * step < seconds - 1e-9:
        times.append(index * step)
        index += 1
    return iter(times) if seconds is not None else (i * step for i in range(limits.frames + 1))


def _taken(
    container: Any, wanted: Iterator[float], place: Place, limits: Limits, name: str
) -> Iterator[tuple[np.ndarray, float]]:
    """Frames that are the first at or after each wanted time, each once."""
    target = next(wanted, None)
    taken = size = 0
    start: float | None = None
    for frame in container.decode(video=0):
        if target is None:
            return
        time = 0.0 if frame.time is None else float(frame.time)
        start = time if start is None else start
        limits.check("seconds", time - start, place, name)
        if time - start < target - 1e-3:
            continue
        limits.check("pixels", frame.width * frame.height, place, name)
        array = upright(frame.to_ndarray(format="rgb24"), getattr(frame, "rotation", 0))
        taken, size = taken + 1, size + array.nbytes
        limits.check("frames", taken, place, name)
        limits.check("decoded_bytes", size, place, name)
        yield array, time - start
        while target is not None and target <= time - start + 1e-3:
            target = next(wanted, None)


def upright(array: np.ndarray, degrees: float) -> np.ndarray:
    """A frame uint8 `[H, W, 3]` turned upright: phones write films on their side and note the turn, counterclockwise,
    beside them.
    """
    turns = round(degrees / 90) % 4
    return np.ascontiguousarray(np.rot90(array, turns)) if turns else array
