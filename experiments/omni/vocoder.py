"""Waves of log-mel frames, so that what a model says can be heard.

Magnitudes are found by least squares, phases as Griffin and Lim do.

Legend: N clips, F mel frames, M mel bands, B frequency bins, S samples.
"""

import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ftrain.modules.audio_encoder import AudioConfig
from ftrain.modules.log_mel import mel_filters

_ROUNDS = 32
_MOMENTUM = 0.99  # Perraudin et al. 2013: as good in 32 rounds as without it in some hundred
_TINY = 1e-8
_PAUSE_S = 0.25


def waves(mels_NFM: np.ndarray, *, cfg: AudioConfig) -> np.ndarray:
    """Waves float32 `[N, F * hop]`, about -1 to 1, of log-mel clips as `audio_encoder.log_mel` makes them.

    The phases, which mel frames do not hold, are found so that overlapping windows agree (Griffin and Lim 1984), from
    random ones that are the same each time. ValueError for another number of bands than the config's.
    """
    if mels_NFM.ndim != 3 or mels_NFM.shape[2] != cfg.mels:
        raise ValueError(f"waves are made of clips [N, F, {cfg.mels}], got {list(mels_NFM.shape)}")
    magnitude_NBF = _magnitudes(torch.from_numpy(np.asarray(mels_NFM, np.float32)), cfg).transpose(1, 2)
    window = torch.hann_window(cfg.n_fft)
    # The frame centred on the end, which mel frames leave out, is the last one again.
    magnitude_NBF = torch.cat([magnitude_NBF, magnitude_NBF[..., -1:]], 2)
    angle = torch.rand(magnitude_NBF.shape, generator=torch.Generator().manual_seed(0)) * 2 * torch.pi
    phase, before = torch.polar(torch.ones_like(angle), angle), torch.zeros(magnitude_NBF.shape, dtype=torch.complex64)
    size = mels_NFM.shape[1] * cfg.hop
    for _ in range(_ROUNDS):
        wave_NS = torch.istft(magnitude_NBF * phase, cfg.n_fft, cfg.hop, window=window, length=size)
        now = torch.stft(wave_NS, cfg.n_fft, cfg.hop, window=window, return_complex=True)
        ahead = now + _MOMENTUM * (now - before)
        phase, before = ahead / ahead.abs().clamp(min=_TINY), now
    return torch.istft(magnitude_NBF * phase, cfg.n_fft, cfg.hop, window=window, length=size).numpy()


def _magnitudes(mels_NFM: Tensor, cfg: AudioConfig) -> Tensor:
    """Magnitudes `[N, F, B]`: the power of least squares, less what is below zero."""
    power_NFM = 10.0 ** (4.0 * mels_NFM - 4.0)
    inverse_MB = torch.from_numpy(np.linalg.pinv(mel_filters(cfg.rate, cfg.n_fft, cfg.mels))).float()
    return (power_NFM @ inverse_MB).clamp(min=0.0).sqrt()


def write_wav(file: Path, waves: Sequence[np.ndarray], *, rate: int) -> None:
    """Waves `[S]` of about -1 to 1 at `rate` samples a second one after the other, with pauses, as a mono WAV file."""
    pause_S = np.zeros(int(_PAUSE_S * rate), np.float32)
    whole_S = np.concatenate([part for wave_S in waves for part in (wave_S, pause_S)])
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((np.clip(whole_S, -1, 1) * 32_767).astype("<i2").tobytes())
