"""Spoken numbers as frames that are heard and units that are spoken, of real voices; a judge of spoken units.

A word is asked, and the next number is the answer (nine: zero). Units are the codes of a codebook of sound, made of the
trained voices alone (ftrain/modules/codebook_averages.py). The judge has heard real units of trained voices only.

Legend: N clips, F mel frames of a clip, M mel bands, L heard frames, U units, W numbers of a window, R rows.
"""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from experiments.omni import corpus
from experiments.omni.corpus import Clips, CorpusConfig
from experiments.omni.language import LANGUAGES
from experiments.omni.sources import features
from experiments.omni.speech import Silence
from ftrain.kernels import random
from ftrain.modules import codebook, codebook_averages, spec
from ftrain.modules.audio_encoder import AudioConfig

NUMBERS = LANGUAGES[0].numbers[:10]
LETTERS = "".join(sorted({letter for word in NUMBERS for letter in word}))
PAD, BOS, EOS, BLANK = (len(LETTERS) + i for i in range(4))
VOCAB = len(LETTERS) + 4
FRAMES, UNITS, CODES = 28, 14, 48
"""Heard frames and spoken units of a word, and different units."""
MEL = AudioConfig(64, 1, 2, 64, rate=corpus.RATE, n_fft=512, hop=128, mels=40)
WINDOW = 4 * MEL.mels
"""Numbers of a heard frame: four mel frames, set on by two."""


@dataclass(frozen=True)
class Said:
    """One split: what is heard, float32 `[N, L, W]`, as units, int64 `[N, U]`, which number it is, and by whom."""

    heard_NLW: np.ndarray
    units_NU: np.ndarray
    number_N: np.ndarray
    voices: np.ndarray


@dataclass(frozen=True)
class Judge:
    """Tells the number of units; `held_out`: the share of real held-out words that it tells right, by voices that
    nobody was trained on.
    """

    classifier: LogisticRegression
    held_out: float

    def told(self, units_NU: np.ndarray) -> np.ndarray:
        """The number `[N]` that the units sound like most."""
        found: np.ndarray = self.classifier.predict(_marks(units_NU))
        return found


def letters(word: str) -> list[int]:
    """The tokens of a word.

    >>> len(letters("seven")), max(letters("zero")) < PAD
    (5, True)
    """
    return [LETTERS.index(letter) for letter in word]


def spelled(tokens: list[int]) -> str:
    """The word of tokens; others than letters are left out."""
    return "".join(LETTERS[token] for token in tokens if token < PAD)


def clips(*, takes: int = 4, seed: int = 0) -> tuple[Clips, Clips, Clips]:
    """Words to train on, of trained voices said otherwise, and of voices that are held out. ValueError without
    espeak-ng, with the reason.
    """
    made = corpus.load(cfg=CorpusConfig(train_takes=takes, voice_takes=2, seed=seed), languages=LANGUAGES[:1])
    if isinstance(made, Silence):
        raise ValueError(made.reason)
    apart_N = np.isin([delivery.voice for delivery in made.held_out.deliveries], corpus.HELD_OUT_VOICES)
    return made.train, corpus.part(made.held_out, ~apart_N), corpus.part(made.held_out, apart_N)


def said(of: Clips, units_KW: torch.Tensor) -> Said:
    """What clips are to a model; `units_KW`: as of `learnt_units`."""
    mels_NFM = _mels(of)
    rows = torch.from_numpy(_pieces(mels_NFM).reshape(-1, WINDOW))
    around = np.pad(mels_NFM, ((0, 0), (1, 1), (0, 0)))
    heard = np.stack([around[:, i : i + 2 * FRAMES : 2] for i in range(4)], 2).reshape(len(mels_NFM), FRAMES, WINDOW)
    voices = np.array([delivery.voice for delivery in of.deliveries])
    return Said(heard, codebook.nearest(rows, units_KW).reshape(-1, UNITS).numpy(), of.labels_N, voices)


def judge(trained: Said, held_out: Said) -> Judge:
    """A judge of real units."""
    made = Judge(LogisticRegression(C=0.3, max_iter=300).fit(_marks(trained.units_NU), trained.number_N), 0.0)
    return Judge(made.classifier, float(np.mean(made.told(held_out.units_NU) == held_out.number_N)))


def learnt_units(of: Clips, *, seed: int = 0, steps: int = 60) -> torch.Tensor:
    """The units of sound `[CODES, W]` that clips are made of."""
    return averaged(_pieces(_mels(of)).reshape(-1, WINDOW), CODES, seed=seed, steps=steps)


def averaged(rows_RW: np.ndarray, entries: int, *, seed: int, steps: int = 60, batch: int = 1024) -> torch.Tensor:
    """A codebook `[entries, W]`: moving averages of the rows that are nearest; dead ones revived."""
    rows, key = torch.from_numpy(rows_RW), random.key(seed)
    state = spec.init(codebook_averages.state_specs(1, entries, rows.shape[1]), key)
    state = codebook_averages.revived(state, rows[None], key=key, least=2.0)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        chosen = rows[rng.choice(len(rows), min(batch, len(rows)), replace=False)]
        found = codebook.quantize(chosen, codebook_averages.books(state))
        state = codebook_averages.moved(state, found, decay=0.8)
        if step < steps // 2:
            state = codebook_averages.revived(state, found.left_QRZ, key=random.fold_in(key, step), least=0.5)
    return codebook_averages.books(state)[0]


def _mels(clips: Clips) -> np.ndarray:
    return features(clips, MEL).mels_NFM.astype(np.float32)


def _pieces(mels_NFM: np.ndarray) -> np.ndarray:
    """Four mel frames each, `[N, U, W]`."""
    return mels_NFM.reshape(len(mels_NFM), UNITS, WINDOW)


def _marks(units_NU: np.ndarray) -> np.ndarray:
    """Which unit is where, and, less sharply, near."""
    ones = np.eye(CODES)[units_NU]
    near = ones.copy()
    near[:, 1:] += ones[:, :-1] / 2
    near[:, :-1] += ones[:, 1:] / 2
    return np.concatenate([near.reshape(len(ones), -1), ones.sum(1)], 1)
