"""Log-mel spectrograms as Whisper reads them.

n samples of a recording, F frames, M mel bands.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ftrain.modules.log_mel import log_mel, require_wave


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

    def __call__(self, sound: np.ndarray, *, rate: int | None = None) -> np.ndarray:
        """float32 `[M, F]` of floating `[n]`, F = n // hop. `rate`: of the recording, where it is known.

        ValueError for a recording that is shorter than a window, of another rate, or of numbers that are whole or not
        finite.

        >>> LogMel(seconds=None)(np.zeros(1600, np.float32)).shape
        (80, 10)
        """
        require_wave(sound, rate=self.rate if rate is None else rate, wanted=self.rate)
        if self.seconds is not None:
            samples = round(self.seconds * self.rate)
            sound = np.pad(sound[:samples], (0, max(0, samples - len(sound))))
        if len(sound) <= self.window // 2:
            raise ValueError(f"a recording of {len(sound)} samples is shorter than a window of {self.window}")
        wave_S = torch.from_numpy(sound.astype(np.float64))
        log_FM = log_mel(wave_S, rate=self.rate, n_fft=self.window, hop=self.hop, mels=self.bands)
        return log_FM.T.numpy().astype(np.float32)
