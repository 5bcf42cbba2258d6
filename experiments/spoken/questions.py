"""Spoken questions about numbers and spoken answers: "after three" is asked by many voices, and a few answer "four".

Held out are whole voices that ask (`experiments.omni.corpus`): of no family that is trained on. The voices that answer
are trained voices, since the talker is to speak as one of them; the judge that listens to it has heard real clips of
all trained voices.

Legend: N clips, S samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from experiments.omni.corpus import HELD_OUT_VOICES, TRAINED_VOICES, cut
from experiments.omni.digits import CLASSES
from experiments.omni.language import LANGUAGES
from experiments.omni.speech import Silence, Speaker, find_way

WORDS = LANGUAGES[0].numbers
"""What can be answered: zero to eighteen."""

QUESTIONS = tuple(
    (f"{asked} {WORDS[n]}", answer)
    for asked, of in (("after", lambda n: n + 1), ("before", lambda n: n - 1), ("twice", lambda n: 2 * n))
    for n in range(CLASSES)
    if 0 <= (answer := of(n)) < len(WORDS)
)
"""Each question, and the number that answers it."""

ASKING, ANSWERING = 96 * 128, 64 * 128
"""Samples of a question and of an answer: 1.11 s and 0.74 s."""

SPEAKERS = ("f1", "m1", "Annie", "rob")
"""The voices that answer."""

_SPEEDS, _PITCHES = (160, 180, 200, 220), (20, 40, 60, 80)


class Said(NamedTuple):
    """Clips float32 `[N, S]`; what was said (the number of the question or word) and by which voice, int64 `[N]`."""

    waves_NS: np.ndarray
    what_N: np.ndarray
    voice_N: np.ndarray


@dataclass(frozen=True)
class Recordings:
    """Questions to train on and of held-out voices; answers by `SPEAKERS`; words by trained and by held-out voices."""

    asked: Said
    held_out: Said
    answers: Said
    words: Said
    held_out_words: Said


def record(*, takes: int = 3, voices: int = len(TRAINED_VOICES), seed: int = 0) -> Recordings:
    """Synthesise all of it: each question and word `takes` times by each of the first `voices` trained voices.

    Speeds and pitches are drawn by the seed. ValueError where there is no espeak-ng.
    """
    way = find_way()
    if isinstance(way, Silence):
        raise ValueError(way.reason)
    rng, heard = np.random.default_rng(seed), TRAINED_VOICES[:voices]
    asked = [text for text, _ in QUESTIONS]
    drawn = list(product(_SPEEDS, _PITCHES))
    with way() as speaker:

        def say(texts: Sequence[str], by: Sequence[str], count: int, samples: int) -> Said:
            clips = []
            for (what, text), (who, voice) in product(enumerate(texts), enumerate(by)):
                for i in rng.choice(len(drawn), count, replace=False):
                    clips.append((_clip(speaker, text, voice, *drawn[i], samples), what, who))
            waves, what_N, voice_N = zip(*clips, strict=True)
            return Said(np.stack(waves), np.array(what_N), np.array(voice_N))

        answers = [
            (_clip(speaker, word, voice, 190, pitch, ANSWERING), what, who)
            for (what, word), (who, voice), pitch in product(enumerate(WORDS), enumerate(SPEAKERS), (40, 60))
        ]
        waves, what_N, who_N = zip(*answers, strict=True)
        return Recordings(
            say(asked, heard, takes, ASKING),
            say(asked, HELD_OUT_VOICES, 1, ASKING),
            Said(np.stack(waves), np.array(what_N), np.array(who_N)),
            say(WORDS, heard, takes, ANSWERING),
            say(WORDS, HELD_OUT_VOICES, min(4, takes), ANSWERING),
        )


def _clip(speaker: Speaker, text: str, voice: str, speed: int, pitch: int, samples: int) -> np.ndarray:
    return cut(speaker.say(text, voice=f"en+{voice}", speed=speed, pitch=pitch), samples=samples)


def chosen(said: Said, size: int, *, seed: int, number: int) -> np.ndarray:
    """The places of the clips of batch `number` of `size`: each clip once in each round, in an order of its own."""
    count = len(said.what_N)
    at = np.arange(number * size, (number + 1) * size)
    rounds = {r: np.random.default_rng([seed, r]).permutation(count) for r in dict.fromkeys((at // count).tolist())}
    return np.array([rounds[int(i // count)][i % count] for i in at])
