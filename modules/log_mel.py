"""Log-mel spectrograms of waves, as Whisper reads them (Radford et al. 2022).

Legend: S samples, F frames, B frequency bins, M mel bands.
"""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor


def require_wave(wave_S: np.ndarray, *, rate: int, wanted: int) -> None:
    """ValueError for a wave of another rate than is wanted, of numbers that are whole or not finite, or of several
    channels. `rate`, `wanted`: samples a second.

    >>> import numpy as np
    >>> from ftrain.modules.log_mel import require_wave
    >>> require_wave(np.zeros(9, np.int16), rate=16_000, wanted=16_000)
    Traceback (most recent call last):
    ValueError: a wave of int16: give floating numbers from -1 to 1 (those of 16 bits over 32768)
    """
    if rate != wanted:
        raise ValueError(
            f"a wave of {rate} samples a second, and {wanted} are heard: resample it (ftrain.data.media.audio.resample)"
        )
    if wave_S.ndim != 1:
        raise ValueError(f"a wave {list(wave_S.shape)}: give one channel [samples], the mean of several")
    if not np.issubdtype(wave_S.dtype, np.floating):
        raise ValueError(f"a wave of {wave_S.dtype}: give floating numbers from -1 to 1 (those of 16 bits over 32768)")
    if not np.isfinite(wave_S).all():
        place = int(np.flatnonzero(~np.isfinite(wave_S))[0])
        raise ValueError(f"sample {place} of a wave is no finite number: leave the recording out")


@cache
def mel_filters(rate: int, n_fft: int, mels: int) -> np.ndarray:
    """Triangular filters `[n_fft // 2 + 1, mels]`, float64, from 0 Hz to half the rate, on Slaney's mel scale.

    The scale is linear to 1 kHz (200/3 Hz per mel) and logarithmic above (27 mels to a factor of 6.4), each filter has
    the same area (Slaney, Auditory Toolbox, 1998): librosa's default, and Whisper's.
    """
    edges_hz = _mel_to_hz(np.linspace(0.0, _hz_to_mel(rate / 2), mels + 2))
    bins_hz = np.linspace(0.0, rate / 2, n_fft // 2 + 1)[:, None]
    low, centre, high = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    triangles = np.minimum((bins_hz - low) / (centre - low), (high - bins_hz) / (high - centre))
    return np.maximum(triangles, 0.0) * 2.0 / (high - low)


def _hz_to_mel(hz: float) -> float:
    return hz * 3 / 200 if hz < 1000 else 15 + math.log(hz / 1000) * 27 / math.log(6.4)


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * math.log(6.4) / 27))


def log_mel(wave_S: Tensor, *, rate: int, n_fft: int, hop: int, mels: int) -> Tensor:
    """Log-mel spectrogram `[S // hop, mels]` of a mono wave in [-1, 1], scaled as Whisper does.

    Power spectra of Hann windows centred on samples 0, hop, 2 hop, ... (reflected at the ends; the frame centred on the
    end is left out), mel filters, log10 of at least 1e-10, cut at 8 below the clip's loudest, then `(x + 4) / 4`.

    ValueError for more than one channel, or a clip shorter than half a window.

    >>> import torch
    >>> from ftrain.modules.log_mel import log_mel
    >>> list(log_mel(torch.zeros(1600), rate=16_000, n_fft=400, hop=160, mels=80).shape)
    [10, 80]
    """
    if wave_S.ndim != 1 or wave_S.shape[0] <= n_fft // 2 or wave_S.shape[0] < hop:
        raise ValueError(
            f"log_mel takes one channel [S] of more than {max(n_fft // 2, hop - 1)} samples, got {list(wave_S.shape)}"
        )
    window = torch.hann_window(n_fft, dtype=wave_S.dtype, device=wave_S.device)
    spectrum = torch.stft(wave_S, n_fft, hop, window=window, center=True, pad_mode="reflect", return_complex=True)
    power_FB = spectrum[:, : wave_S.shape[0] // hop].abs().square().T
    filters_BM = torch.from_numpy(mel_filters(rate, n_fft, mels)).to(power_FB)
    log_FM = (power_FB @ filters_BM).clamp(min=1e-10).log10()
    return (torch.maximum(log_FM, log_FM.max() - 8.0) + 4.0) / 4.0
