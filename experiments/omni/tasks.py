"""The tasks: each example is a document to train on, the prompt that begins it, and the answer it is scored by.

An example is a pure function of (task, index, seed, split): the same in any run, in any order, after a resume. Training
examples are drawn at random; held-out examples go through the held-out images or clips in a fixed shuffled order, so
that the first so many cover that many different ones. Held out as well are combinations, each part of which is trained
on: a video's digit, direction and language, a sound's digit, language and language of the answer, a word to be spoken
in another language and that language, two digits that are added. Those are among the held-out examples, marked `novel`.

Legend: H rows, W columns, C channels, F mel frames, M mel bands.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from experiments.omni.digits import CLASSES
from experiments.omni.language import BOS, EOS, LANGUAGES, NUMERALS, Language
from experiments.omni.sources import HELD_OUT, TRAIN, Items, Sources
from experiments.omni.video import DIRECTIONS, moving
from ftrain.modules.packing import Document, Media, Target, Text
from ftrain.modules.vision_encoder import patchify

# Unordered pairs; each digit and each sum also occurs in pairs that are trained on. A pair of a digit and a direction
# cannot be held out so: a model learns that the digit is never the one that moves there (47% right, others 96%).
HELD_OUT_SUMS = frozenset({(0, 7), (1, 4), (2, 6), (3, 8), (4, 7), (5, 9)})

LONGEST_ANSWER = 2 + 2 * CLASSES + 1
"""Of a sum: two words, two for each number counted from zero, and the end mark."""

_SNOW = 0.2  # standard deviation, ink being 1 and paper -1: 0.5% more of the held-out writers' digits are recognised

Shown = tuple[str, np.ndarray | str]


@dataclass(frozen=True)
class Example:
    """`document` is the prompt followed by the answer, which alone is trained on.

    `answer` is the words to write, or empty where `digit` is to be drawn, or spoken in language number `spoken`.
    `shown` is the prompt for people: ("text", words), ("image", `[H, W, C]`), ("video", `[S, H, W, C]`), ("audio", mels
    `[F, M]`). `novel` marks a combination that training leaves out.
    """

    task: str
    document: Document
    prompt: Document
    answer: tuple[str, ...]
    digit: int
    shown: tuple[Shown, ...]
    novel: bool = False
    spoken: int = -1


@dataclass(frozen=True)
class _Draw:
    """What a task's function works with; `index` counts the examples of the task in the split."""

    task: str
    index: int
    items: Items
    sources: Sources
    seed: int
    rng: np.random.Generator

    @property
    def training(self) -> bool:
        return self.items.name == TRAIN

    def choose(self, count: int) -> int:
        """In training a random number below `count`, else the next of a fixed shuffle of all of them."""
        if not count:
            raise ValueError(f"task {self.task!r} needs speech: {self.sources.silence}")
        if self.training:
            return int(self.rng.integers(count))
        round_, place = divmod(self.index, count)
        return int(_generator(self.seed, -1 - round_, self.task, HELD_OUT).permutation(count)[place])

    def language(self, *beside: int) -> tuple[Language, bool]:
        """A language, and whether it is held out with the numbers `beside`; in training one that is not."""
        number, novel = self.language_number(*beside)
        return LANGUAGES[number], novel

    def language_number(self, *beside: int) -> tuple[int, bool]:
        """The same by its number."""
        while True:
            number = int(self.rng.integers(len(LANGUAGES)))
            novel = bool(beside) and is_held_out(*beside, number)
            if not (novel and self.training):
                return number, novel


@dataclass(frozen=True)
class _Piece:
    """A part of a prompt: what the model reads, what people see, and the digit that it shows, if any."""

    part: Text | Media
    shown: Shown
    digit: int = -1


def is_held_out(*numbers: int) -> bool:
    """Whether this combination of three numbers is never trained on: one in eleven; any two of them occur otherwise."""
    return sum(numbers) % 11 == 3


def _generator(seed: int, index: int, task: str, split: str) -> np.random.Generator:
    """Random numbers of one example: a stream by (seed; index, task, split), independent of all others."""
    stream = (index & (2**48 - 1)) << 16 | list(TASKS).index(task) << 1 | (split == HELD_OUT)
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64)))


def _say(draw: _Draw, *words: str) -> _Piece:
    return _Piece(Text(draw.sources.words.encode(words)), ("text", " ".join(words)))


def _seen(draw: _Draw, place: int) -> np.ndarray:
    """An image to read `[H, W, C]`; in training under snow, of which no two examples have the same."""
    image_HWC = draw.items.images.images_NHWC[place]
    if not draw.training:
        return image_HWC
    return image_HWC + _SNOW * draw.rng.standard_normal(image_HWC.shape, np.float32)


def _image(draw: _Draw, place: int) -> _Piece:
    image_HWC = _seen(draw, place)
    part = Media("image", patchify(image_HWC, cfg=draw.sources.readers.image))
    return _Piece(part, ("image", image_HWC), int(draw.items.images.labels_N[place]))


def _clip(draw: _Draw, place: int) -> _Piece:
    speech = draw.items.speech
    assert speech is not None
    mel_FM = speech.mels_NFM[place]
    if draw.training:
        mel_FM = _shift_bands(mel_FM, int(draw.rng.integers(-1, 2)))
    return _Piece(Media("audio", {"mel_FM": mel_FM}), ("audio", mel_FM), int(speech.clips.labels_N[place]))


def _shift_bands(mel_FM: np.ndarray, bands: int) -> np.ndarray:
    """All bands moved up, the edge repeated: another length of vocal tract (98.7% to 99.3% on held-out voices)."""
    return mel_FM[:, np.clip(np.arange(mel_FM.shape[1]) - bands, 0, mel_FM.shape[1] - 1)]


def _clips(draw: _Draw) -> int:
    return 0 if draw.items.speech is None else len(draw.items.speech.mels_NFM)


def _answered(draw: _Draw, pieces: list[_Piece], answer: tuple[str, ...], digit: int, *, novel: bool) -> Example:
    """An example whose answer is words."""
    prompt = _opened(draw, pieces)
    document = (*prompt, Text(draw.sources.words.encode((*answer, EOS)), train=True))
    return Example(draw.task, document, prompt, answer, digit, tuple(p.shown for p in pieces), novel)


def _drawn(draw: _Draw, pieces: list[_Piece], digit: int) -> Example:
    """An example whose answer is a real image of the digit, as the decoder takes it: channels first."""
    prompt = _opened(draw, pieces)
    places = np.flatnonzero(draw.items.drawn.labels_N == digit)
    image_HWC = draw.items.drawn.images_NHWC[places[draw.rng.integers(len(places))]]
    shown = tuple(p.shown for p in pieces)
    target = Target("image", image_HWC.transpose(2, 0, 1))
    return Example(draw.task, (*prompt, target), prompt, (), digit, shown)


def _opened(draw: _Draw, pieces: list[_Piece]) -> Document:
    return (Text(draw.sources.words.encode((BOS,))), *(piece.part for piece in pieces))


def _image_to_text(draw: _Draw) -> Example:
    """`en: read <image>` -> `three`."""
    piece, (language, _) = _image(draw, draw.choose(len(draw.items.images.labels_N))), draw.language()
    pieces = [_say(draw, language.tag, language.read), piece]
    return _answered(draw, pieces, (language.numbers[piece.digit],), piece.digit, novel=False)


def _audio_to_text(draw: _Draw) -> Example:
    """`de: schreib <audio>` -> `drei`, whatever the language that was spoken."""
    place = draw.choose(_clips(draw))
    piece = _clip(draw, place)
    assert draw.items.speech is not None
    language, novel = draw.language(piece.digit, int(draw.items.speech.clips.languages_N[place]))
    pieces = [_say(draw, language.tag, language.write), piece]
    return _answered(draw, pieces, (language.numbers[piece.digit],), piece.digit, novel=novel)


def _video_to_text(draw: _Draw) -> Example:
    """`fr: regarde <video>` -> `trois gauche`."""
    place, way = draw.choose(len(draw.items.images.labels_N)), int(draw.rng.integers(len(DIRECTIONS)))
    digit, direction = int(draw.items.images.labels_N[place]), DIRECTIONS[way]
    language, novel = draw.language(digit, way)
    readers = draw.sources.readers
    video_SHWC = moving(_seen(draw, place), direction, cfg=readers.film)
    piece = _Piece(Media("video", patchify(video_SHWC, cfg=readers.video)), ("video", video_SHWC), digit)
    answer = (language.numbers[digit], language.direction(direction))
    pieces = [_say(draw, language.tag, language.watch), piece]
    return _answered(draw, pieces, answer, digit, novel=novel)


def _text_to_image(draw: _Draw) -> Example:
    """`es: dibuja tres` -> an image."""
    number, digit = divmod(draw.choose(len(LANGUAGES) * CLASSES), CLASSES)
    language = LANGUAGES[number]
    return _drawn(draw, [_say(draw, language.tag, language.draw, language.numbers[digit])], digit)


def _audio_to_image(draw: _Draw) -> Example:
    """`it: disegna <audio>` -> an image."""
    piece, (language, _) = _clip(draw, draw.choose(_clips(draw))), draw.language()
    return _drawn(draw, [_say(draw, language.tag, language.draw), piece], piece.digit)


def _text_to_audio(draw: _Draw) -> Example:
    """`es: di three` -> a sound of `tres`, by one of the speakers (held out: by any voice)."""
    written, digit = divmod(draw.choose(len(LANGUAGES) * CLASSES if _clips(draw) else 0), CLASSES)
    number, novel = draw.language_number(digit, written)
    language = LANGUAGES[number]
    pieces = [_say(draw, language.tag, language.say, LANGUAGES[written].numbers[digit])]
    prompt, speech = _opened(draw, pieces), draw.items.speech
    assert speech is not None
    places = speech.spoken[number, digit]
    target = Target("audio", speech.said_NFM[places[draw.rng.integers(len(places))]])
    shown = tuple(p.shown for p in pieces)
    return Example(draw.task, (*prompt, target), prompt, (), digit, shown, novel, number)


def counted(language: Language, target: int, count: int, running: int) -> tuple[str, ...]:
    """How a sum is counted: pairs of a numeral, up to that of the target, and the sum so far, which stands last.

    >>> counted(LANGUAGES[0], 2, 0, 5)
    ('0', 'five', '1', 'six', '2', 'seven')
    """
    pairs = ((NUMERALS[done], language.numbers[running + done - count]) for done in range(count, target + 1))
    return tuple(word for pair in pairs for word in pair)


def _arithmetic(draw: _Draw) -> Example:
    """`en: <image> plus <audio> equals` -> `three 2 0 three 1 four 2 five`: both numbers, the second as a numeral, and
    what `counted` says of them; each operand is shown, said or written, and at least one is shown.

    In training a third each are sums, pairs that are read and not added, which are all pairs, and countings that begin
    anywhere, of which many are of no sum. Of sums alone a model learns which pairs never occur (0% of them are right).
    """
    kind = int(draw.rng.integers(3)) if draw.training else 0
    if kind == 1:
        return _count_on(draw)
    language, _ = draw.language()
    while True:
        first = _image(draw, int(draw.rng.integers(len(draw.items.images.labels_N))))
        second = _operand(draw, language)
        novel = is_held_out_sum(first.digit, second.digit)
        if kind == 2 or not (novel and draw.training):
            break
    left, right = (first, second) if draw.rng.integers(2) else (second, first)
    read = (language.numbers[left.digit], NUMERALS[right.digit])
    if kind == 2:
        return _answered(draw, [_say(draw, language.tag, language.read), left, right], read, right.digit, novel=False)
    pieces = [_say(draw, language.tag), left, _say(draw, language.plus), right, _say(draw, language.equals)]
    answer = (*read, *counted(language, right.digit, 0, left.digit))
    return _answered(draw, pieces, answer, left.digit + right.digit, novel=novel)


def _count_on(draw: _Draw) -> Example:
    """`en: count 4 2 nine` -> `3 ten 4 eleven`, but for what is part of a held-out sum."""
    language, _ = draw.language()
    while True:
        target = int(draw.rng.integers(CLASSES))
        count = int(draw.rng.integers(target + 1))
        running = int(draw.rng.integers(len(language.numbers) - target + count))
        if not is_held_out_sum(target, running - count):
            break
    words = counted(language, target, count, running)
    prompt = _say(draw, language.tag, language.count, NUMERALS[target], *words[:2])
    return _answered(draw, [prompt], words[2:], running + target - count, novel=False)


def is_held_out_sum(one: int, other: int) -> bool:
    """Whether the sum of these two, in either order, is never trained on."""
    return (min(one, other), max(one, other)) in HELD_OUT_SUMS


def _operand(draw: _Draw, language: Language) -> _Piece:
    """A digit that is shown, written, or, where there is speech, said."""
    kind = draw.rng.integers(2 if draw.items.speech is None else 3)
    if kind == 0:
        return _image(draw, int(draw.rng.integers(len(draw.items.images.labels_N))))
    if kind == 2:
        return _clip(draw, int(draw.rng.integers(_clips(draw))))
    digit = int(draw.rng.integers(CLASSES))
    piece = _say(draw, language.numbers[digit])
    return _Piece(piece.part, piece.shown, digit)


TASKS: Mapping[str, Callable[[_Draw], Example]] = MappingProxyType(
    {
        "image_to_text": _image_to_text,
        "audio_to_text": _audio_to_text,
        "video_to_text": _video_to_text,
        "text_to_image": _text_to_image,
        "audio_to_image": _audio_to_image,
        "text_to_audio": _text_to_audio,
        "arithmetic": _arithmetic,
    }
)
NEED_SPEECH = frozenset({"audio_to_text", "audio_to_image", "text_to_audio"})
WEIGHTS: Mapping[str, float] = MappingProxyType(
    {
        "image_to_text": 1.25,
        "audio_to_text": 1.5,
        "video_to_text": 5.0,
        "text_to_image": 1.0,
        "audio_to_image": 1.0,
        "text_to_audio": 2.5,
        "arithmetic": 2.0,
    }
)


def sample(task: str, index: int, *, sources: Sources, seed: int, split: str) -> Example:
    """Example `index` (from 0) of a task: the same for the same arguments, whatever was drawn before."""
    if task not in TASKS:
        raise ValueError(f"task={task!r} is not one of {list(TASKS)}")
    if index < 0 or seed < 0:
        raise ValueError(f"index={index} and seed={seed} must not be negative")
    rng = _generator(seed, index, task, split)
    return TASKS[task](_Draw(task, index, sources.split(split), sources, seed, rng))


def possible(sources: Sources) -> tuple[str, ...]:
    """The tasks that these sources allow: all, or those without speech."""
    return tuple(task for task in TASKS if task not in NEED_SPEECH or sources.train.speech is not None)


@dataclass(frozen=True)
class Mixture:
    """Training examples of all tasks that have sources, as often as `weights` says, in an order that `seed` decides."""

    sources: Sources
    seed: int
    weights: Mapping[str, float] = field(default_factory=lambda: WEIGHTS)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights) - set(TASKS))
        if unknown or min(self.weights.values(), default=-1.0) < 0:
            raise ValueError(f"weights={dict(self.weights)}: need numbers of at least 0 for some of {list(TASKS)}")
        if not sum(self.weights.get(task, 0.0) for task in possible(self.sources)):
            raise ValueError(f"weights={dict(self.weights)} leave no task that the sources allow")

    @property
    def drawn(self) -> tuple[str, ...]:
        """The tasks of which there are examples."""
        return tuple(task for task in possible(self.sources) if self.weights.get(task, 0.0) > 0)

    def example(self, index: int) -> Example:
        """Training example `index` (from 0): a pure function of the index."""
        tasks = possible(self.sources)
        shares = np.array([self.weights.get(task, 0.0) for task in tasks])
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, 1 << 63 | index], np.uint64)))
        task = tasks[int(np.searchsorted(np.cumsum(shares) / shares.sum(), rng.random(), side="right"))]
        return sample(task, index, sources=self.sources, seed=self.seed, split=TRAIN)
