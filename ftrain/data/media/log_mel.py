"""Log-mel spectrograms as Whisper reads them.

n samples of a recording, F frames, M mel bands.
"""

from dataclasses import dataclass

import numpy as np

_BREAK_HZ, _BREAK_MEL = 1000.0, 15.0  # Slaney's scale: linear below, logarithmic above
_STEP = np.log(6.4) / 27.0


@dataclass(frozen=True)
class LogMel:
    """A log-mel spectrogram of windows of `window` samples, `hop` samples apart.

    Args:
        bands: M; 80, and 128 for Whisper large-v3.
        rate: samples a second.
        window: samples of a window, Hann's.
        hop: samples from one window to the next.
        seconds: recordings are cut or filled up with silence to this length; None leaves theirs.
    """

    bands: int = 80
    rate: int = 16_000
    window: int = 400
    hop: int = 160
    seconds: float | None = 30.0

    def __call__(self, sound: np.ndarray) -> np.ndarray:
        """float32 `[M, F]` of float32 `[n]`, F = n // hop. ValueError for a recording that is shorter than a window.

        >>> LogMel(seconds=None)(np.zeros(1600, np.float32)).shape
        (80, 10)
        """
        if self.seconds is not None:
            samples = round(self.seconds * self.rate)
            sound = np.pad(sound[:samples], (0, max(0, samples - len(sound))))
        if len(sound) <= self.window // 2:
            raise ValueError(f"a recording of {len(sound)} samples is shorter than a window of {self.window}")
        power = self._power(sound)
        mel = np.maximum(1e-10, self._filters().T @ power)
        log = np.log10(mel)
        return ((np.maximum(log, log.max() - 8.0) + 4.0) / 4.0).astype(np.float32)

    def _power(self, sound: np.ndarray) -> np.ndarray:
        """Squares of the spectrum, float64 `[window // 2 + 1, F]`."""
        padded = np.pad(sound.astype(np.float64), self.window // 2, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(padded, self.window)[:: self.hop][:-1]
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(self.window) / self.window)
        return np.abs(np.fft.rfft(frames * hann, axis=1)).T ** 2

    def _filters(self) -> np.ndarray:
        """Triangles of equal area on Slaney's mel scale, float64 `[window // 2 + 1, M]`."""
        bins = np.linspace(0, self.rate / 2, self.window // 2 + 1)
        edges = _hertz(np.linspace(_mel(0.0), _mel(self.rate / 2), self.bands + 2))
        slopes = edges[None, :] - bins[:, None]
        widths = np.diff(edges)
        rising, falling = -slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
        return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (edges[2:] - edges[:-2]))


def _mel(hertz: float) -> float:
    if hertz < _BREAK_HZ:
        return hertz * 3.0 / 200.0
    return float(_BREAK_MEL + np.log(hertz / _BREAK_HZ) / _STEP)


def _hertz(mels: np.ndarray) -> np.ndarray:
    above = _BREAK_HZ * np.exp(_STEP * (mels - _BREAK_MEL))
    return np.where(mels < _BREAK_MEL, mels * 200.0 / 3.0, above)
