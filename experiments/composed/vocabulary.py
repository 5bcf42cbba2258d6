"""What the compositions read and write: a few English words, and marks around media.

Marks are new tokens behind those of the words, whether these are the experiment's own or a published foundation's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.omni.language import LANGUAGES

NUMBERS = LANGUAGES[0].numbers[:10]
VERBS = ("read", "hear", "draw", "larger", "smaller")
WORDS = (*VERBS, *NUMBERS)
MARKS = ("<s>", "</s>", "<image>", "</image>", "<audio>", "</audio>", "<drawing>", "</drawing>")


@dataclass(frozen=True)
class Vocabulary:
    """The words alone, a token each, or with `tokenizer` those of a published foundation of so many ids (`known`)."""

    known: int = len(WORDS)
    tokenizer: Any = None

    @staticmethod
    def of_folder(folder: Path, *, known: int) -> "Vocabulary":
        """That of the tokenizer in a folder. ValueError where there is none, or it has more than `known` tokens."""
        from ftrain.data.chat_template import load_tokenizer  # without a folder nothing of transformers is needed

        found = load_tokenizer(folder)
        if len(found) > known:
            raise ValueError(f"{folder}: its tokenizer has {len(found)} tokens, and the foundation's table {known}")
        return Vocabulary(known, found)

    def __len__(self) -> int:
        return self.known + len(MARKS)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {mark: self.known + i for i, mark in enumerate(MARKS)}

    def mark(self, name: str) -> int:
        """The id of one of `MARKS`."""
        return self._ids[name]

    def around(self, name: str) -> dict[str, int]:
        """`begin` and `end` of media called `name`."""
        return {"begin": self.mark(f"<{name}>"), "end": self.mark(f"</{name}>")}

    def encode(self, words: Sequence[str]) -> list[int]:
        """The ids of words. ValueError for one that is not of `WORDS`, where these are all."""
        if self.tokenizer is not None:
            return list(self.tokenizer.encode(" ".join(words), add_special_tokens=False))
        strange = [word for word in words if word not in WORDS]
        if strange:
            raise ValueError(f"{strange[0]!r} is none of the words {WORDS}")
        return [WORDS.index(word) for word in words]

    def decode(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The words of ids, without marks."""
        kept = [i for i in ids if i < self.known]
        if self.tokenizer is not None:
            return tuple(self.tokenizer.decode(kept).split())
        return tuple(WORDS[i] for i in kept)
