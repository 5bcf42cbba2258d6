"""Documents of two kinds: a number is heard, written and drawn; or it is seen, written and spoken.

Legend: N pictures, B documents, T tokens, L tokens of a document, A places of text, U units, C codes of a picture, W
numbers of a heard frame, P numbers of a patch.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from experiments.ming.model import PICTURE, SOUND, TEXT, Composed, scores
from experiments.omni.digits import SIDE, Digits
from experiments.stream.words import (
    BOS,
    CODES,
    EOS,
    FRAMES,
    NUMBERS,
    PAD,
    UNITS,
    VOCAB,
    WINDOW,
    Said,
    averaged,
    letters,
)
from ftrain.modules import codebook
from ftrain.modules.decoder import IGNORE
from ftrain.modules.spec import Tree

PLACES = max(map(len, NUMBERS)) + 2
EDGE, PATCHES, SHADES = 2, 16, 32
"""Pixels along a patch, patches of a picture, different patches that are drawn."""
FIRST = {TEXT: 0, SOUND: VOCAB, PICTURE: VOCAB + CODES}
"""Where the ids of a modality begin."""
COMPOSED = Composed(WINDOW, EDGE**2, VOCAB + CODES + SHADES)
Way = Literal["heard", "seen"]


@dataclass(frozen=True)
class Pictures:
    """Patches float32 `[N, C, P]` as they are seen, their codes `[N, C]` as they are drawn, and which number it is."""

    patches_NCP: np.ndarray
    codes_NC: np.ndarray
    number_N: np.ndarray


def shades(digits: Digits, *, seed: int = 0) -> torch.Tensor:
    """The codebook `[SHADES, P]` of patches."""
    return averaged(_patches(digits.images_NHWC).reshape(-1, EDGE**2), SHADES, seed=seed)


def pictures(digits: Digits, shades_KP: torch.Tensor) -> Pictures:
    """Digits as they are seen and drawn."""
    patches = _patches(digits.images_NHWC)
    codes = codebook.nearest(torch.from_numpy(patches.reshape(-1, EDGE**2)), shades_KP)
    return Pictures(patches, codes.reshape(-1, PATCHES).numpy(), digits.labels_N)


def drawn(codes_NC: np.ndarray, shades_KP: torch.Tensor) -> np.ndarray:
    """The images `[N, 8, 8, 1]` of codes."""
    side = SIDE // EDGE
    patches = shades_KP.numpy()[codes_NC].reshape(-1, side, side, EDGE, EDGE)
    return patches.transpose(0, 1, 3, 2, 4).reshape(-1, SIDE, SIDE, 1)


def _patches(images_NHWC: np.ndarray) -> np.ndarray:
    side = SIDE // EDGE
    split = images_NHWC[..., 0].reshape(-1, side, EDGE, side, EDGE).transpose(0, 1, 3, 2, 4)
    return np.ascontiguousarray(split.reshape(-1, PATCHES, EDGE**2))


def lay(way: Way, given: np.ndarray, numbers: np.ndarray, codes: np.ndarray, *, first: int = 0) -> dict[str, Any]:
    """A pack of documents of one kind: heard frames `[B, FRAMES, W]`, or patches `[B, PATCHES, P]`, the numbers that
    are written, and the codes of the answer `[B, U or C]`. `first`: the id of the first document.
    """
    count, questions = given.shape[:2]
    kind, answer = (SOUND, PICTURE) if way == "heard" else (PICTURE, SOUND)
    text_BA = np.full((count, PLACES), PAD)
    for own, number in zip(text_BA, numbers, strict=True):
        word = letters(NUMBERS[number])
        own[: len(word) + 2] = [BOS, *word, EOS]
    kinds = np.repeat([kind, TEXT, answer], [questions, PLACES, codes.shape[1]])
    tokens_BL = np.concatenate([np.zeros((count, questions), np.int64), text_BA, codes + FIRST[answer]], 1)
    asked_BL = np.zeros((count, len(kinds)), np.int64)
    asked_BL[:, :questions] = kind
    rows = {name: np.zeros((count, len(kinds), width), np.float32) for name, width in _WIDTHS.items()}
    rows["heard_TW" if way == "heard" else "seen_TP"][:, :questions] = given
    made = {
        **rows,
        "tokens_T": tokens_BL,
        "given_T": asked_BL,
        "kind_T": np.tile(kinds, (count, 1)),
        "next_kind_T": np.tile(np.roll(kinds, -1), (count, 1)),
        "labels_T": _labels(tokens_BL, questions),
        "positions_T": np.tile(np.arange(len(kinds)), (count, 1)),
        "documents_T": np.repeat(first + np.arange(count)[:, None], len(kinds), 1),
    }
    return {name: torch.from_numpy(x.reshape(-1, *x.shape[2:])) for name, x in made.items()}


_WIDTHS = {"heard_TW": WINDOW, "seen_TP": EDGE**2}


def _labels(tokens_BL: np.ndarray, questions: int) -> np.ndarray:
    """What follows each token: nothing within the question, nothing that is padding."""
    labels_BL = np.concatenate([tokens_BL[:, 1:], np.full((len(tokens_BL), 1), IGNORE)], 1)
    labels_BL[:, :questions] = IGNORE
    return np.where(labels_BL == PAD, IGNORE, labels_BL)


def batch_of(said: Said, seen: Pictures, rng: np.random.Generator, documents: int) -> dict[str, Any]:
    """Training documents, half of each kind, each with an answer of the other kind of the same number."""
    half = documents // 2
    heard_B, seen_B = (rng.choice(len(x.number_N), half, replace=False) for x in (said, seen))
    draws = _of_numbers(seen.number_N, said.number_N[heard_B], rng)
    speaks = _of_numbers(said.number_N, seen.number_N[seen_B], rng)
    sounds = said.heard_NLW[heard_B] + rng.normal(scale=0.03, size=(half, FRAMES, WINDOW)).astype(np.float32)
    patches = seen.patches_NCP[seen_B] + rng.normal(scale=0.1, size=(half, PATCHES, EDGE**2)).astype(np.float32)
    parts = (
        lay("heard", sounds, said.number_N[heard_B], seen.codes_NC[draws]),
        lay("seen", patches, seen.number_N[seen_B], said.units_NU[speaks], first=half),
    )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _of_numbers(number_N: np.ndarray, wanted_B: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.array([rng.choice(np.flatnonzero(number_N == number)) for number in wanted_B])


def answer(params: Tree, way: Way, given: np.ndarray, cfg: Composed) -> tuple[list[list[int]], np.ndarray]:
    """What is written to each question, and the codes of what is drawn or spoken, `[B, C or U]`, greedily."""
    count, questions = given.shape[:2]
    kind, length = (PICTURE, PATCHES) if way == "heard" else (SOUND, UNITS)
    batch = lay(way, given, np.zeros(count, np.int64), np.zeros((count, length), np.int64))
    tokens_BL = batch["tokens_T"].view(count, -1)
    tokens_BL[:, questions + 1 :] = PAD
    last = FIRST[kind] + (SHADES if kind == PICTURE else CODES)
    for place in range(questions + 1, tokens_BL.shape[1]):
        with torch.no_grad():
            scores_BV = scores(params, batch, cfg).view(count, -1, cfg.ids)[:, place - 1]
        if place < questions + PLACES:
            ended_B = torch.isin(tokens_BL[:, place - 1], torch.tensor([EOS, PAD]))
            tokens_BL[:, place] = torch.where(ended_B, PAD, scores_BV[:, :VOCAB].argmax(-1))
        else:
            tokens_BL[:, place] = FIRST[kind] + scores_BV[:, FIRST[kind] : last].argmax(-1)
    text, codes = tokens_BL[:, questions : questions + PLACES], tokens_BL[:, questions + PLACES :]
    return text.tolist(), (codes - FIRST[kind]).numpy()
