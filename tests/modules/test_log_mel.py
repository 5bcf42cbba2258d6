"""The spectrogram against an independent one in numpy; tests/ftrain/data/media/test_audio.py has Whisper's."""

import math

import numpy as np
import pytest
import torch

from ftrain.modules import log_mel


def wave(seconds: float, *, rate: int) -> np.ndarray:
    """A chirp with noise."""
    times = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(0).normal(size=times.shape)
    return (0.5 * np.sin(2 * np.pi * (200 + 700 * times) * times) + 0.01 * noise).astype(np.float32)


def naive_log_mel(wave: np.ndarray, *, rate: int, n_fft: int, hop: int, mels: int) -> np.ndarray:
    """Slaney's filters and Whisper's scaling, filter by filter and frame by frame, in float64."""

    def hz(mel: float) -> float:
        return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    top = 15 + 27 * math.log(rate / 2 / 1000, 6.4) if rate > 2000 else rate / 2 * 3 / 200
    edges = [hz(top * i / (mels + 1)) for i in range(mels + 2)]
    filters = np.zeros((mels, n_fft // 2 + 1))
    for m in range(mels):
        low, centre, high = edges[m : m + 3]
        for b in range(n_fft // 2 + 1):
            f = b * rate / n_fft
            rise, fall = (f - low) / (centre - low), (high - f) / (high - centre)
            filters[m, b] = max(0.0, min(rise, fall)) * 2 / (high - low)
    padded = np.pad(wave.astype(np.float64), n_fft // 2, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    frames = [padded[i * hop : i * hop + n_fft] * window for i in range(len(wave) // hop)]
    power = np.abs(np.fft.rfft(np.stack(frames), axis=1)) ** 2
    log = np.log10(np.maximum(power @ filters.T, 1e-10))
    return (np.maximum(log, log.max() - 8) + 4) / 4


@pytest.mark.parametrize(
    ("rate", "n_fft", "hop", "mels"),
    [(16000, 400, 160, 80), (8000, 128, 40, 10), (22050, 512, 200, 64), (2000, 64, 16, 5)],
)
def test_log_mel_is_the_textbook_spectrogram(rate: int, n_fft: int, hop: int, mels: int) -> None:
    sound = wave(0.3, rate=rate)
    made = log_mel.log_mel(torch.from_numpy(sound), rate=rate, n_fft=n_fft, hop=hop, mels=mels)
    expected = naive_log_mel(sound, rate=rate, n_fft=n_fft, hop=hop, mels=mels)
    np.testing.assert_allclose(made.numpy(), expected, atol=2e-4)


def test_a_pure_tone_is_loudest_in_its_own_band() -> None:
    tone = torch.sin(2 * math.pi * 1000 * torch.arange(8000) / 8000)
    mel_FM = log_mel.log_mel(tone, rate=8000, n_fft=512, hop=80, mels=20)
    centres = log_mel._mel_to_hz(np.linspace(0.0, log_mel._hz_to_mel(4000.0), 22))[1:-1]
    assert abs(centres[int(mel_FM[50].argmax())] - 1000) == np.abs(centres - 1000).min()
