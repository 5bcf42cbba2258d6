"""Recordings by soundfile (WAV, FLAC, OGG, MP3), others by PyAV: one channel, at the rate that a model reads."""

import io
from math import gcd
from typing import Any

import numpy as np
from scipy.signal import resample_poly

try:
    import soundfile
except ImportError as absent:
    raise ValueError('recordings need soundfile: pip install "ftrain-omni[media]"') from absent

from ftrain.data import media
from ftrain.data.media.limits import Limits
from ftrain.data.media.opening import media_bytes, name_of
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place


def read_audio(source: Any, place: Place, limits: Limits, *, rate: int) -> np.ndarray:
    """A recording as float32 `[samples]` in [-1, 1], `rate` samples a second; channels are averaged.

    `source`: a path, the bytes of a file, or (array [samples] or [samples, channels], rate) of floats in [-1, 1] or of
    int16. BadRow where it is too long (which is seen before it is decoded, or at the latest when the limit is reached),
    broken, empty, or of an unknown format.
    """
    if isinstance(source, tuple) and len(source) == 2:
        sound, found = _given(source, place)
        limits.check("seconds", len(sound) / max(1, found), place, "an array")
    else:
        sound, found = _decoded(media_bytes(source, place, limits), place, limits, name_of(source))
    if not sound.size:
        raise BadRow(place, "broken media", f"{name_of(source)} is an empty recording")
    mono = sound if sound.ndim == 1 else sound.mean(axis=1, dtype=np.float32)
    if not np.isfinite(mono).all():
        raise BadRow(place, "broken media", f"{name_of(source)} holds numbers that are not finite")
    return resample(mono, found, rate)


def _given(source: tuple[Any, Any], place: Place) -> tuple[np.ndarray, int]:
    """An array and its rate: float32 in [-1, 1]. BadRow where they are none, or numbers of an unknown range."""
    try:
        sound, rate = np.asarray(source[0]), int(source[1])
    except (ValueError, TypeError) as error:
        raise BadRow(place, "broken media", f"an array of a recording and its rate: {error}") from error
    if sound.ndim not in (1, 2) or rate < 1:
        raise BadRow(place, "broken media", f"a recording {list(sound.shape)} at {rate} a second, not [samples]")
    if sound.dtype == np.int16:
        return sound.astype(np.float32) / 32768, rate
    if sound.dtype.kind != "f" and sound.size and (sound.dtype.kind not in "iu" or sound.max() > 1 or sound.min() < -1):
        detail = f"a recording of {sound.dtype}, whose loudest nothing tells: give int16, or floats in [-1, 1]"
        raise BadRow(place, "broken media", detail)
    return sound.astype(np.float32), rate


def heard_samples(source: Any, place: Place, limits: Limits, *, rate: int) -> int:
    """How many samples `read_audio` gives of a recording, from its header where soundfile knows it. BadRow likewise."""
    if isinstance(source, tuple) and len(source) == 2:
        sound, found = _given(source, place)
        samples = len(sound)
    else:
        raw = media_bytes(source, place, limits)
        try:
            with soundfile.SoundFile(io.BytesIO(raw)) as file:
                limits.check("seconds", file.frames / file.samplerate, place, name_of(source))
                samples, found = file.frames, file.samplerate
        except soundfile.LibsndfileError:
            sound, found = media.audio_av.decode(raw, place, limits, name_of(source))
            samples = len(sound)
    if not samples:
        raise BadRow(place, "broken media", f"{name_of(source)} is an empty recording")
    return -(-samples * rate // found)


def _decoded(raw: bytes, place: Place, limits: Limits, name: str) -> tuple[np.ndarray, int]:
    try:
        with soundfile.SoundFile(io.BytesIO(raw)) as file:
            limits.check("seconds", file.frames / file.samplerate, place, name)
            limits.check("decoded_bytes", file.frames * file.channels * 4, place, name)
            return file.read(dtype="float32"), file.samplerate
    except soundfile.LibsndfileError:
        found: tuple[np.ndarray, int] = media.audio_av.decode(raw, place, limits, name)
        return found


def resample(sound: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """float32 `[samples]` of one rate at another one, low-pass filtered: float32 `[ceil(samples * wanted / rate)]`."""
    if rate == wanted:
        return np.ascontiguousarray(sound, np.float32)
    common = gcd(rate, wanted)
    return resample_poly(sound, wanted // common, rate // common).astype(np.float32)
