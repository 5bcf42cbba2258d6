"""Documents of five kinds: a picture is read, a word is heard, two numbers are compared, a digit is drawn by its
word or by the sound of it.

Pictures are rows of one to three handwritten digits, so they are of several sizes; what is drawn is one digit. Held out
are whole writers, whole voices, and pairs of numbers, each of which is compared with others.

Legend: N digits or clips, H rows, W columns, C channels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from scipy.signal import resample_poly

from experiments.composed.model import Composition
from experiments.composed.vocabulary import NUMBERS
from experiments.omni import corpus, digits
from experiments.omni.corpus import Clips
from experiments.omni.digits import SIDE, Digits, Warp
from ftrain.modules.packing import Document, Media, Target, Text
from ftrain.modules.tower_encoders import RATE, heard, seen

SHARES: Mapping[str, int] = MappingProxyType(
    {"image_to_text": 3, "audio_to_text": 3, "text_to_text": 2, "text_to_image": 2, "audio_to_image": 2}
)
"""The kinds, by what is read and what is written, and how many of twelve documents are of each."""
TOLD: Mapping[str, str] = MappingProxyType(
    {
        "image_to_text": "pictures of one to three digits read",
        "audio_to_text": "spoken words written",
        "text_to_text": "numbers compared",
        "text_to_image": "digits drawn by their words",
        "audio_to_image": "digits drawn by their sounds",
    }
)
"""The kinds for people."""
_LONGEST = 3  # digits of a picture
_SNOW = 0.2
_HISS = 0.002


class Question(NamedTuple):
    """A document: its `prompt`, the `words` of the right answer (or that name what is drawn), and the whole."""

    kind: str
    prompt: Document
    words: tuple[str, ...]
    whole: Document


@dataclass(frozen=True)
class Things:
    """What there is to see, to hear and to compare in one split: digits, clips, and pairs of different numbers.

    `waves_NS`: clips at `RATE`, which say `numbers_N`. `trains`: digits are bent and under snow, clips under a hiss, of
    which no two documents have the same.
    """

    digits: Digits
    waves_NS: np.ndarray
    numbers_N: np.ndarray
    pairs: tuple[tuple[int, int], ...]
    trains: bool


def things(images: tuple[Digits, Digits], clips: tuple[Clips, Clips]) -> tuple[Things, Things]:
    """What is trained on and what is held out, of both splits of digits and clips."""
    pairs = [(a, b) for a in range(10) for b in range(10) if a != b]
    held_out = [pair for pair in pairs if (min(pair) + 2 * max(pair)) % 7 == 3]
    seen_pairs = tuple(pair for pair in pairs if pair not in held_out)
    parts = zip(images, clips, (seen_pairs, tuple(held_out)), (True, False), strict=True)
    trained, other = (Things(own, _at_rate(said), said.labels_N, *rest) for own, said, *rest in parts)
    return trained, other


def _at_rate(clips: Clips) -> np.ndarray:
    common = math.gcd(RATE, corpus.RATE)
    made: np.ndarray = resample_poly(clips.waves_NS, RATE // common, corpus.RATE // common, axis=1)
    return made.astype(np.float32)


@dataclass(frozen=True)
class Asker:
    """Makes questions about `of` for the model of a composition."""

    of: Things
    to: Composition

    def ask(self, kind: str, number: int, rng: np.random.Generator) -> Question:
        """The question of this number, from 0: in training drawn by `rng`, else the next of what is held out.

        ValueError for an unknown kind.
        """
        if kind not in SHARES:
            raise ValueError(f"kind={kind!r} is none of {list(SHARES)}")
        read, _, written = kind.partition("_to_")
        if kind == "text_to_text":
            return self._compared(self._chosen(len(self.of.pairs), number, rng), rng)
        if read == "image":
            places = [self._chosen(len(self.of.digits.labels_N), number + i, rng) for i in range(1 + number % _LONGEST)]
            return self._answered(kind, ["read"], [self._picture(places, rng)], self.of.digits.labels_N[places])
        if read == "audio":
            place = self._chosen(len(self.of.numbers_N), number, rng)
            spoken, label = [self._sound(place, rng)], self.of.numbers_N[[place]]
            if written == "text":
                return self._answered(kind, ["hear"], spoken, label)
            return self._drawn(kind, ["draw"], spoken, int(label[0]), rng)
        digit = self._chosen(10, number, rng)
        return self._drawn(kind, ["draw", NUMBERS[digit]], [], digit, rng)

    def _chosen(self, count: int, number: int, rng: np.random.Generator) -> int:
        if self.of.trains:
            return int(rng.integers(count))
        return int(np.random.default_rng(number // count).permutation(count)[number % count])

    def _compared(self, place: int, rng: np.random.Generator) -> Question:
        pair = self.of.pairs[place]
        verb = ("larger", "smaller")[int(rng.integers(2))]
        answer = max(pair) if verb == "larger" else min(pair)
        return self._answered("text_to_text", [verb, *(NUMBERS[n] for n in pair)], [], np.array([answer]))

    def _answered(self, kind: str, said: list[str], media: Sequence[Media], labels_N: np.ndarray) -> Question:
        words, of = tuple(NUMBERS[label] for label in labels_N), self.to.words
        prompt = self._opened(said, media)
        return Question(kind, prompt, words, [*prompt, Text([*of.encode(words), of.mark("</s>")], train=True)])

    def _drawn(
        self, kind: str, said: list[str], media: Sequence[Media], digit: int, rng: np.random.Generator
    ) -> Question:
        prompt = self._opened(said, media)
        places = np.flatnonzero(self.of.digits.labels_N == digit)
        image_HWC = self._image(int(places[rng.integers(len(places))]), rng, snow=0.0)
        side, channels = self.to.codec.size, self.to.codec.channels
        target = Target("image", enlarged(image_HWC, side, channels).transpose(2, 0, 1).copy())
        return Question(kind, prompt, (NUMBERS[digit],), [*prompt, target])

    def _opened(self, said: list[str], media: Sequence[Media]) -> list[Text | Media | Target]:
        return [Text([self.to.words.mark("<s>"), *self.to.words.encode(said)]), *media]

    def _image(self, place: int, rng: np.random.Generator, *, snow: float) -> np.ndarray:
        image_HWC = self.of.digits.images_NHWC[place]
        if not self.of.trains:
            return image_HWC
        bent = digits.bend(image_HWC[None], rng, warp=Warp())[0]
        return bent + snow * rng.standard_normal(bent.shape, np.float32)

    def _picture(self, places: Sequence[int], rng: np.random.Generator) -> Media:
        """Digits side by side, each at least two tokens a side."""
        eye = self.to.eye
        side = int(np.lcm(2 * eye.patch * eye.merge, SIDE))
        own = [enlarged(self._image(place, rng, snow=_SNOW), side, eye.channels) for place in places]
        return seen("image", np.concatenate(own, 1), eye)

    def _sound(self, place: int, rng: np.random.Generator) -> Media:
        wave_S = self.of.waves_NS[place]
        if self.of.trains:
            wave_S = wave_S + _HISS * rng.standard_normal(wave_S.shape, np.float32)
        return heard("audio", wave_S, self.to.ear, merge=self.to.merge)


def enlarged(image_HWC: np.ndarray, side: int, channels: int) -> np.ndarray:
    """A digit `[SIDE, SIDE, 1]` with so many pixels a side and channels, all of which are alike.

    ValueError for a side that is no multiple.
    """
    if side % SIDE:
        raise ValueError(f"a picture of {side} pixels a side: digits have {SIDE}, and are enlarged to multiples of it")
    times = side // SIDE
    return np.repeat(image_HWC.repeat(times, 0).repeat(times, 1), channels, 2)


def shrunk(images_NCHW: np.ndarray) -> np.ndarray:
    """Drawn pictures as digits are, `[N, SIDE, SIDE, 1]`: means over pixels and channels."""
    count, channels, height, _ = images_NCHW.shape
    times = height // SIDE
    blocks = images_NCHW.reshape(count, channels, SIDE, times, SIDE, times)
    return blocks.mean((1, 3, 5))[..., None]


def batch_of(asker: Asker, rng: np.random.Generator, dozens: int) -> list[Question]:
    """Training documents, twelve times `dozens`, of all kinds."""
    kinds = [kind for kind, share in SHARES.items() for _ in range(share * dozens)]
    return [asker.ask(kind, number, rng) for number, kind in enumerate(kinds)]
