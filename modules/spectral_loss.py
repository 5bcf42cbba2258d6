"""How far one waveform is from another, by the log-mel spectra of windows of many lengths: what a codec is trained on.

Long windows tell tones apart, short ones say when something happens (Yamamoto et al. 2020); the distance is that of
Kumar et al., arXiv 2306.06546, mean absolute differences of decimal logarithms.

Legend: B recordings, C channels, S samples, W windows of a recording, n samples of a window, M mel bands.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ftrain.kernels.mean import Mean, mean_where
from ftrain.modules.log_mel import mel_filters

_QUIET = 1e-5  # magnitudes below are as this one
_BANDS = 5 / 32  # of a window's samples


@dataclass(frozen=True)
class SpectralConfig:
    """`rate` samples a second, windows of `sizes` samples, each set on by a quarter of it, and of each 5/32 as many mel
    bands.

    ValueError for a window of less than 16 samples, or that is no multiple of 4.
    """

    rate: int
    sizes: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)

    def __post_init__(self) -> None:
        wrong = [size for size in self.sizes if size < 16 or size % 4]
        if wrong or not self.sizes:
            raise ValueError(f"SpectralConfig: sizes={self.sizes}: need windows of at least 16 samples, multiples of 4")


def spectral_terms(made_BCS: Tensor, given_BCS: Tensor, cfg: SpectralConfig, samples_B: Tensor) -> dict[str, Mean]:
    """For each size a term `spectrum_<n>`: the mean over windows and bands, differentiable in both waveforms.

    Windows count that end within the first `samples_B` (int64) of their recording; of none the term counts nothing.
    ValueError for waveforms of two shapes.

    >>> tone_BCS = torch.arange(64.0).sin()[None, None]
    >>> terms = spectral_terms(10 * tone_BCS, tone_BCS, SpectralConfig(8000, sizes=(32,)), torch.tensor([64]))
    >>> round(terms["spectrum_32"].item(), 4)  # a tenth is one decimal
    1.0
    """
    if made_BCS.shape != given_BCS.shape:
        raise ValueError(f"waveforms {list(made_BCS.shape)} and {list(given_BCS.shape)} are of two shapes")
    return {f"spectrum_{size}": _term(made_BCS, given_BCS, size, cfg.rate, samples_B) for size in cfg.sizes}


def _term(made_BCS: Tensor, given_BCS: Tensor, size: int, rate: int, samples_B: Tensor) -> Mean:
    apart_BCW = (_log_mel(made_BCS, size, rate) - _log_mel(given_BCS, size, rate)).abs().mean(-1)
    ends_W = size + torch.arange(apart_BCW.shape[-1], device=apart_BCW.device) * (size // 4)
    counted_BCW = (ends_W <= samples_B[:, None])[:, None].expand_as(apart_BCW)
    return mean_where(apart_BCW.flatten(), counted_BCW.flatten())


def _log_mel(wave_BCS: Tensor, size: int, rate: int) -> Tensor:
    """`[B, C, W, M]`, float32 or wider."""
    wave_BCS = wave_BCS.to(torch.promote_types(wave_BCS.dtype, torch.float32))
    wave_BCS = torch.nn.functional.pad(wave_BCS, (0, max(size - wave_BCS.shape[-1], 0)))
    window = torch.hann_window(size, dtype=wave_BCS.dtype, device=wave_BCS.device)
    spectra = torch.view_as_real(torch.fft.rfft(wave_BCS.unfold(-1, size, size // 4) * window))
    magnitudes = (spectra.square().sum(-1) + _QUIET**2).sqrt()
    filters = torch.from_numpy(mel_filters(rate, size, int(size * _BANDS))).to(magnitudes)
    return (magnitudes @ filters).clamp(min=_QUIET).log10()
