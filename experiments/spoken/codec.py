"""Sound as codes: a residual vector quantizer (SoundStream, Zeghidour et al. 2021) of log-mel frames; and back.

Four frames of 40 bands are one vector, and a vector is a sum of entries, one of each level's codebook. The codebooks
are fitted by k-means, level by level, to what the levels before leave over; no network is trained. A wave comes back
through magnitudes that the mel bands allow, with phases found by Griffin and Lim's iteration (1984).

Legend: N clips, S samples, F mel frames, M bands, T code frames, P numbers in a vector (4 M), Q levels, K entries.
"""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans

from experiments.omni.corpus import RATE
from ftrain.modules.audio_encoder import log_mel, mel_filters

HOP, N_FFT, MELS = 128, 512, 40
TOGETHER = 4
"""Mel frames that share a code frame."""

_ROUNDS = 32
_QUIET = 1e-10


def mels_of(wave_S: np.ndarray) -> np.ndarray:
    """Log-mel frames float32 `[F, M]` of a wave `[S]` at `RATE`."""
    return log_mel(torch.from_numpy(wave_S), rate=RATE, n_fft=N_FFT, hop=HOP, mels=MELS).numpy()


def mels(waves_NS: np.ndarray) -> np.ndarray:
    """Those of each wave, `[N, F, M]`."""
    return np.stack([mels_of(wave_S) for wave_S in waves_NS])


@dataclass(frozen=True)
class Codec:
    """The codebooks `[Q, K, P]` float32."""

    books_QKP: np.ndarray

    @property
    def levels(self) -> int:
        """Q."""
        return len(self.books_QKP)

    @property
    def entries(self) -> int:
        """K."""
        return self.books_QKP.shape[1]

    def encode(self, mels_NFM: np.ndarray) -> np.ndarray:
        """Codes int64 `[N, T, Q]`. ValueError for frames that are not whole code frames."""
        left_NTP = _vectors(mels_NFM)
        codes = []
        for book_KP in self.books_QKP:
            code_NT = nearest(left_NTP, book_KP)
            codes.append(code_NT)
            left_NTP = left_NTP - book_KP[code_NT]
        return np.stack(codes, -1)

    def decode(self, codes_NTQ: np.ndarray) -> np.ndarray:
        """Mel frames `[N, F, M]` of codes."""
        made_NTP = sum(book_KP[codes_NTQ[..., q]] for q, book_KP in enumerate(self.books_QKP))
        return np.asarray(made_NTP).reshape(len(codes_NTQ), -1, MELS)


def fit(mels_NFM: np.ndarray, *, levels: int = 4, entries: int = 128, seed: int = 0) -> Codec:
    """Codebooks for clips like these."""
    left_RP = _vectors(mels_NFM).reshape(-1, TOGETHER * MELS)
    books = []
    for level in range(levels):
        found = MiniBatchKMeans(entries, batch_size=4096, n_init=1, random_state=seed + level).fit(left_RP)
        books.append(found.cluster_centers_.astype(np.float32))
        left_RP = left_RP - books[-1][nearest(left_RP, books[-1])]
    return Codec(np.stack(books))


def nearest(x_P: np.ndarray, book_KP: np.ndarray) -> np.ndarray:
    """The closest entry of each vector `[..., P]`, int64 `[...]`."""
    return ((book_KP**2).sum(1) - 2 * x_P @ book_KP.T).argmin(-1)


def _vectors(mels_NFM: np.ndarray) -> np.ndarray:
    N, F, M = mels_NFM.shape
    if F % TOGETHER or M != MELS:
        raise ValueError(f"the codec takes mels [N, F, {MELS}], F a multiple of {TOGETHER}; got {[N, F, M]}")
    return mels_NFM.reshape(N, F // TOGETHER, TOGETHER * M).astype(np.float32)


def waves(mels_NFM: np.ndarray) -> np.ndarray:
    """Waves float32 `[N, F * HOP]` whose mels are about these, of the loudness that the clips of the corpus have."""
    power_NFM = 10.0 ** (torch.from_numpy(mels_NFM).float() * 4 - 4)
    filters_BM = torch.from_numpy(mel_filters(RATE, N_FFT, MELS)).float()
    magnitude_NFB = _spread(power_NFM, filters_BM).sqrt()
    window, samples = torch.hann_window(N_FFT), mels_NFM.shape[1] * HOP
    # the last frame, centred on the end, is not among the mels
    magnitude_NBF = torch.cat([magnitude_NFB, magnitude_NFB[:, -1:]], 1).mT
    spectrum = magnitude_NBF.to(torch.complex64)
    for _ in range(_ROUNDS):
        made = torch.istft(spectrum, N_FFT, HOP, window=window, length=samples)
        again = torch.stft(made, N_FFT, HOP, window=window, return_complex=True)
        spectrum = magnitude_NBF * again / again.abs().clamp(min=1e-8)
    made = torch.istft(spectrum, N_FFT, HOP, window=window, length=samples)
    loud = made.square().mean(1, keepdim=True).sqrt().clamp(min=1e-8)
    return (made * 0.1 / loud).numpy()


def _spread(power_NFM: torch.Tensor, filters_BM: torch.Tensor) -> torch.Tensor:
    """Powers of bins, not negative, whose mel bands are about these: multiplicative updates (Lee and Seung 2000)."""
    power_NFB = power_NFM @ (filters_BM / filters_BM.sum(0)).T + _QUIET
    above = power_NFM @ filters_BM.T
    for _ in range(_ROUNDS):
        power_NFB = power_NFB * above / (power_NFB @ filters_BM @ filters_BM.T + _QUIET)
    return power_NFB
