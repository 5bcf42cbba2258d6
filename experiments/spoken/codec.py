"""Sound as codes: a residual vector quantizer (SoundStream, Zeghidour et al. 2021) of log-mel frames; and back.

Four frames of 40 bands are one vector, and a vector is a sum of entries, one of each level's codebook. The codebooks
are fitted by k-means, level by level, to what the levels before leave over; no network is trained. Waves are made of
mel frames by `experiments.omni.vocoder`.

Legend: N clips, F mel frames, M bands, T code frames, P numbers in a vector (4 M), Q levels, K entries.
"""

from dataclasses import dataclass

import numpy as np
from sklearn.cluster import MiniBatchKMeans

from experiments.omni.corpus import RATE
from ftrain.modules.audio_encoder import AudioConfig

SOUND = AudioConfig(1, layers=1, heads=1, d_out=1, rate=RATE, n_fft=512, hop=128, mels=40, merge=1)
"""Which mel frames are coded; its sizes of an encoder say nothing."""

TOGETHER = 4
"""Mel frames that share a code frame."""


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
        return np.asarray(made_NTP).reshape(len(codes_NTQ), -1, SOUND.mels)


def fit(mels_NFM: np.ndarray, *, levels: int = 4, entries: int = 128, seed: int = 0) -> Codec:
    """Codebooks for clips like these."""
    left_RP = _vectors(mels_NFM).reshape(-1, TOGETHER * SOUND.mels)
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
    if F % TOGETHER or SOUND.mels != M:
        raise ValueError(f"the codec takes mels [N, F, {SOUND.mels}], F a multiple of {TOGETHER}; got {[N, F, M]}")
    return mels_NFM.reshape(N, F // TOGETHER, TOGETHER * M).astype(np.float32)
