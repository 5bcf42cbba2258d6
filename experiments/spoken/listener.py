"""A judge of spoken words: a recogniser that has heard real voices only, and knows how often it errs.

Legend: N clips, S samples, F mel frames, M bands, W words.
"""

from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import PCA
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from experiments.omni.sources import less_means, log_mels
from experiments.spoken.codec import SOUND

_SHIFTS = (-2, 0, 2)  # mel frames


@dataclass(frozen=True)
class Listener:
    """A trained recogniser, and the share of real words by held-out voices that it understands: a score's ceiling."""

    recogniser: Pipeline
    held_out_accuracy: float

    def hears(self, waves_NS: np.ndarray) -> np.ndarray:
        """The number of the word, int64 `[N]`, that each wave sounds like most."""
        return self.recogniser.predict(features(waves_NS)).astype(np.int64)


def train(waves_NS: np.ndarray, words_N: np.ndarray, unseen_NS: np.ndarray, unseen_words_N: np.ndarray) -> Listener:
    """A support vector machine on mel frames of real words, each also a little earlier and later."""
    mels_NFM = log_mels(waves_NS, SOUND)
    copies = [np.roll(mels_NFM, by, axis=1) for by in _SHIFTS]
    x = np.concatenate([_flat(copy) for copy in copies])
    found = make_pipeline(StandardScaler(), PCA(100, whiten=True, random_state=0), SVC(C=10, gamma=0.01))
    found.fit(x, np.tile(words_N, len(copies)))
    right_N = found.predict(features(unseen_NS)) == unseen_words_N
    return Listener(found, float(right_N.mean()))


def features(waves_NS: np.ndarray) -> np.ndarray:
    """Mel frames, each band less its mean over the clip, two neighbours averaged: `[N, F / 2 * M]`."""
    return _flat(log_mels(waves_NS, SOUND))


def _flat(mels_NFM: np.ndarray) -> np.ndarray:
    level = less_means(mels_NFM)
    return level.reshape(len(level), level.shape[1] // 2, 2, -1).mean(2).reshape(len(level), -1)
