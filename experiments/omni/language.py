"""The words of the experiment in six languages, and a tokenizer of whole words over exactly these.

A prompt opens with the tag of the language that its answer must be in (`de:`), so each question has one right answer.
Words that two languages spell alike (`plus`, `six`) are one token.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from experiments.omni.video import DIRECTIONS

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
MARKS = (
    "<image>", "</image>", "<audio>", "</audio>", "<video>", "</video>", "<image_out>", "</image_out>", "<audio_out>",
    "</audio_out>",
)  # fmt: skip
NUMERALS = tuple("0123456789")
"""Of all languages; what counts is told from what is counted."""
SPECIAL = (PAD, BOS, EOS, *MARKS, *NUMERALS)


@dataclass(frozen=True)
class Language:
    """`voice` is espeak-ng's name of the language; `numbers` are the words of 0 to 18, `directions` those of
    `video.DIRECTIONS`; `read`, `write`, `watch` ask for an image's, a sound's, a video's words, `draw` for a
    drawing, `say` for a spoken word, `count` for counting on.
    """

    tag: str
    voice: str
    numbers: tuple[str, ...]
    directions: tuple[str, ...]
    read: str
    write: str
    watch: str
    draw: str
    say: str
    count: str
    plus: str
    equals: str

    def direction(self, name: str) -> str:
        """The word for one of `video.DIRECTIONS`."""
        return self.directions[DIRECTIONS.index(name)]

    @property
    def words(self) -> tuple[str, ...]:
        """Every word of the language that the experiment uses, its tag first."""
        verbs = (self.read, self.write, self.watch, self.draw, self.say, self.count, self.plus, self.equals)
        return (self.tag, *self.numbers, *self.directions, *verbs)


def _language(voice: str, numbers: str, directions: str, verbs: str, *, tag: str = "") -> Language:
    return Language(f"{tag or voice}:", voice, tuple(numbers.split()), tuple(directions.split()), *verbs.split())


LANGUAGES = (
    _language(
        "en",
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen",
        "left right up down",
        "read write watch draw say count plus equals",
    ),
    _language(
        "de",
        "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn "
        "siebzehn achtzehn",
        "links rechts hoch runter",
        "lies schreib schau zeichne sprich zähl plus gleich",
    ),
    _language(
        "fr",
        "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize dix-sept "
        "dix-huit",
        "gauche droite haut bas",
        "lis écris regarde dessine dis compte plus égale",
    ),
    _language(
        "es",
        "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis "
        "diecisiete dieciocho",
        "izquierda derecha arriba abajo",
        "lee escribe mira dibuja di cuenta más igual",
    ),
    _language(
        "it",
        "zero uno due tre quattro cinque sei sette otto nove dieci undici dodici tredici quattordici quindici sedici "
        "diciassette diciotto",
        "sinistra destra su giù",
        "leggi scrivi guarda disegna pronuncia conta più uguale",
    ),
    _language(
        "cmn",
        "零 一 二 三 四 五 六 七 八 九 十 十一 十二 十三 十四 十五 十六 十七 十八",
        "左 右 上 下",
        "读 写 看 画 说 数 加 等于",
        tag="zh",
    ),
)


@dataclass(frozen=True)
class Tokenizer:
    """A token id is the place of a word in `words`; text is words with spaces between them."""

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.words)) != len(self.words):
            twice = sorted({word for word in self.words if self.words.count(word) > 1})
            raise ValueError(f"words given twice: {twice}")

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def id(self, word: str) -> int:
        """One word's token; ValueError that names the nearest known word if it has none."""
        if word not in self._ids:
            near = difflib.get_close_matches(word, self.words, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{word!r} is not one of the {len(self.words)} words of the vocabulary{hint}")
        return self._ids[word]

    def encode(self, text: str | Iterable[str]) -> list[int]:
        """The tokens of words, given with spaces between them or one by one."""
        return [self.id(word) for word in (text.split() if isinstance(text, str) else text)]

    def decode(self, ids: Sequence[int]) -> str:
        """The words with spaces between them, up to the first end mark; padding and the start mark are left out."""
        words = []
        for i in ids:
            if not 0 <= int(i) < len(self.words):
                raise ValueError(f"token id {int(i)} is outside [0, {len(self.words)})")
            word = self.words[int(i)]
            if word == EOS:
                break
            if word not in (PAD, BOS):
                words.append(word)
        return " ".join(words)


def tokenizer(languages: Sequence[Language] = LANGUAGES) -> Tokenizer:
    """The vocabulary of special tokens and of these languages, in a fixed order."""
    return Tokenizer(tuple(dict.fromkeys([*SPECIAL, *(word for language in languages for word in language.words)])))
