"""Long documents: real English text in which named digits are hidden, written, drawn and spoken; questions at the end.

A document of 2,000 tokens with three needles reads `... red is four ... blue is <image> ... pink is <audio> ... blue ?
two red ? four pink ? nine`. The text is that of Python's own manual, pictures are scikit-learn's handwritten digits,
spoken words are espeak-ng's. Held out are the last fifth of the text, the writers of `experiments.omni.digits`, and the
voices of `experiments.omni.corpus`.

Legend: N items, A answers of a batch.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np
import torch

from experiments.omni import corpus, digits, sources
from experiments.omni.corpus import CorpusConfig
from experiments.omni.digits import CLASSES, Digits
from experiments.omni.language import BOS, LANGUAGES, SPECIAL, Tokenizer
from experiments.omni.sources import HELD_OUT, TRAIN, Speech
from experiments.omni.speech import Silence
from ftrain.modules.audio_encoder import AudioConfig
from ftrain.modules.omni import OmniModel
from ftrain.modules.packing import Document, Media, Text, exact_budget, pack
from ftrain.modules.vision_encoder import VisionConfig, patchify

KINDS = ("word", "picture", "sound")
"""In which ways a digit is hidden."""

IS, ASKED = "is", "?"
_ENGLISH = LANGUAGES[0]
NAMES = ("red", "green", "blue", "white", "black", "yellow", "pink", "brown")
_COMMON = 1000  # words of the text that are tokens, 92% of it; others are left out
_HELD_OUT = 0.2


@dataclass(frozen=True)
class Split:
    """What documents are made of: text as token ids `[N]`, digits to show, digits that are said."""

    name: str
    text_N: np.ndarray
    images: Digits
    speech: Speech


@dataclass(frozen=True)
class Sources:
    """Both splits and their words. `image`, `audio`: whose features media get."""

    train: Split
    held_out: Split
    words: Tokenizer
    image: VisionConfig
    audio: AudioConfig

    def split(self, name: str) -> Split:
        """`"train"` or `"held_out"`."""
        return {TRAIN: self.train, HELD_OUT: self.held_out}[name]


class Needle(NamedTuple):
    """A hidden digit: in which of `KINDS`, its place among the document's tokens over their number, and the digit."""

    kind: int
    depth: float
    digit: int


class Hidden(NamedTuple):
    """A document, and its needles in the order in which they are asked for."""

    document: Document
    needles: tuple[Needle, ...]


def load(image: VisionConfig, audio: AudioConfig, *, takes: int = 6, copies: int = 8, seed: int = 0) -> Sources:
    """Text, pictures (each training picture also bent `copies` times), spoken digits (`takes` of each by each voice).

    ValueError where there is no espeak-ng.
    """
    spoken = corpus.load(cfg=CorpusConfig(train_takes=takes, voice_takes=4, seed=seed), languages=LANGUAGES[:1])
    if isinstance(spoken, Silence):
        raise ValueError(spoken.reason)
    drawn, unseen = digits.split()
    text = re.findall(r"[a-z]+", " ".join(topics[name] for name in sorted(topics)).lower())
    common = [word for word, _ in Counter(text).most_common(_COMMON)]
    words = Tokenizer(tuple(dict.fromkeys([*SPECIAL, *_ENGLISH.numbers[:CLASSES], *NAMES, IS, ASKED, *common])))
    text_N = np.array(words.encode(word for word in text if word in set(common)), np.int64)
    cut = int(len(text_N) * (1 - _HELD_OUT))
    return Sources(
        Split(TRAIN, text_N[:cut], digits.enlarge(drawn, copies=copies, seed=seed), sources.features(spoken[0], audio)),
        Split(HELD_OUT, text_N[cut:], unseen, sources.features(spoken[1], audio)),
        words,
        image,
        audio,
    )


def hide(
    of: Sources, *, split: str, tokens: int, needles: int, rng: np.random.Generator, kinds: Sequence[str] = KINDS
) -> Hidden:
    """A document of `tokens` tokens in which `needles` digits are hidden, of each of `kinds` equally many, shuffled.

    ValueError for more needles than names, or more than the document has room for.
    """
    source, words = of.split(split), of.words
    room = tokens - 1 - needles * (5 + 3)  # a needle takes at most five tokens, its question and answer three
    if needles > len(NAMES) or room < needles:
        raise ValueError(f"{needles} needles in {tokens} tokens: there are {len(NAMES)} names, and room for fewer")
    names = rng.permutation(len(NAMES))[:needles]
    ways = [KINDS.index(kinds[i % len(kinds)]) for i in rng.permutation(needles)]
    places = np.sort(rng.integers(room, size=needles))
    if rng.random() < 0.5:  # half of the documents have one needle in each equal part
        places = (np.arange(needles) + rng.random(needles)) * room // needles
    parts: list[Any] = [Text([words.id(BOS)])]
    found, spent, start = [], 1, int(rng.integers(len(source.text_N)))
    for number, place in enumerate(places.astype(int)):
        before = 0 if number == 0 else int(places[number - 1])
        text = _text(source, start + before, place - before)
        value, digit, size = _value(of, source, KINDS[ways[number]], rng)
        parts += [Text([*text, words.id(NAMES[names[number]]), words.id(IS)]), value]
        spent += len(text) + 2
        found.append(Needle(ways[number], spent / tokens, digit))
        spent += size
    rest = tokens - spent - 3 * needles
    parts.append(Text(_text(source, start + int(places[-1]), rest)))
    order = rng.permutation(needles)
    for i in order:
        parts += [Text(words.encode((NAMES[names[i]], ASKED))), _answer(of, found[i].digit)]
    return Hidden(tuple(parts), tuple(found[i] for i in order))


def _text(source: Split, start: int, count: int) -> list[int]:
    """So many tokens of the text from a place on, and again from its beginning after its end."""
    return np.take(source.text_N, np.arange(start, start + count), mode="wrap").tolist()


def _answer(of: Sources, digit: int) -> Text:
    return Text(of.words.encode((_ENGLISH.numbers[digit],)), train=True)


def _value(of: Sources, source: Split, kind: str, rng: np.random.Generator) -> tuple[Text | Media, int, int]:
    """A digit in one of the ways, which digit it is, and how many tokens it takes."""
    if kind == "picture":
        i = int(rng.integers(len(source.images.labels_N)))
        image_HWC = source.images.images_NHWC[i]
        if source.name == TRAIN:
            image_HWC = image_HWC + 0.2 * rng.standard_normal(image_HWC.shape, np.float32)
        return Media("image", patchify(image_HWC, cfg=of.image)), int(source.images.labels_N[i]), 3
    if kind == "sound":
        i = int(rng.integers(len(source.speech.mels_NFM)))
        return Media("audio", {"mel_FM": source.speech.mels_NFM[i]}), int(source.speech.clips.labels_N[i]), 3
    digit = int(rng.integers(CLASSES))
    return Text(of.words.encode((_ENGLISH.numbers[digit],))), digit, 1


class Asked(NamedTuple):
    """A `batch` of documents of one length, and the needles in the order of its answers."""

    batch: dict[str, Any]
    needles: tuple[Needle, ...]


def batch(
    of: Sources,
    model: OmniModel,
    *,
    split: str,
    documents: int,
    tokens: int,
    needles: int,
    seed: int,
    number: int,
    kinds: Sequence[str] = KINDS,
) -> Asked:
    """Batch `number` of a split: `documents` documents of `tokens` tokens each in one pack, the same for the same seed.

    Beside what `ftrain.modules.packing` lays out: `place_A`, the tokens that answer, `answer_A`, the ids of their
    answers, and `kind_A`, in which of `KINDS` each was hidden.
    """
    stream = (seed << 1 | (split == HELD_OUT), number)
    rng = np.random.Generator(np.random.Philox(key=np.array(stream, np.uint64)))
    made = [hide(of, split=split, tokens=tokens, needles=needles, rng=rng, kinds=kinds) for _ in range(documents)]
    laid = pack([m.document for m in made], budget=exact_budget([m.document for m in made], model=model), model=model)
    asked = tuple(needle for i in laid.taken for needle in made[i].needles)
    labels_T = laid.batch["labels_T"]
    place_A = (labels_T != -100).nonzero().flatten()
    kind_A = torch.tensor([needle.kind for needle in asked])
    return Asked({**laid.batch, "place_A": place_A, "answer_A": labels_T[place_A], "kind_A": kind_A}, asked)


def depths(needles: Sequence[Needle], right_A: np.ndarray, *, parts: int = 5) -> list[float | None]:
    """The share of right answers among needles in each of so many equal parts of a document; None where none lies."""
    part_A = np.array([min(parts - 1, int(needle.depth * parts)) for needle in needles])
    return [float(right_A[part_A == p].mean()) if (part_A == p).any() else None for p in range(parts)]
