"""Recordings that soundfile does not know, such as AAC in MP4, and the sound of films: by PyAV."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np

try:
    import av
except ImportError as absent:
    raise ValueError('recordings of this kind need PyAV: pip install "ftrain-omni[media]"') from absent

from ftrain.data.media.limits import Limits
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place


def decode(raw: bytes, place: Place, limits: Limits, name: str) -> tuple[np.ndarray, int]:
    """The first sound track of a file: float32 `[samples, channels]`, and its rate.

    BadRow where it has none, is too long, or is broken.
    """
    try:
        with av.open(io.BytesIO(raw), mode="r") as container:
            if not container.streams.audio:
                raise BadRow(place, "broken media", f"{name} has no sound")
            if container.duration is not None:
                limits.check("seconds", container.duration / av.time_base, place, name)
            stream = container.streams.audio[0]
            rate = stream.rate
            parts = list(_parts(container, rate, place, limits, name))
    except (av.FFmpegError, ValueError, OSError) as error:
        if isinstance(error, BadRow):
            raise
        raise BadRow(place, "broken media", f"{name} is no whole recording of a known kind: {error}") from error
    return (np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)), rate


def _parts(container: Any, rate: int, place: Place, limits: Limits, name: str) -> Iterator[np.ndarray]:
    resampler = av.AudioResampler(format="fltp", rate=rate)
    taken = 0
    for frame in container.decode(audio=0):
        for piece in resampler.resample(frame):
            array = piece.to_ndarray().T
            taken += len(array)
            limits.check("seconds", taken / rate, place, name)
            limits.check("decoded_bytes", taken * array.shape[1] * 4, place, name)
            yield np.ascontiguousarray(array, np.float32)
