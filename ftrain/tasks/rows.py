"""From samples of data files to the documents of a task: what has labels, and the leaves that the task's loss reads.

Each is a pure function that worker processes can have, called with a sample; BadRow for one that cannot be used.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ftrain.data.documents import Document, Group
from ftrain.data.encoding import ChatEncoder, Encoded
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Captioned, Chat, Classed, Judged, Message, Pair, Place, Preference, Prose, Tokens
from ftrain.tasks.embedding import NEGATIVE, POSITIVE, QUERY
from ftrain.tasks.kto import BAD, GOOD, OTHER
from ftrain.tasks.shared_prompts import shared_documents


@dataclass(frozen=True, eq=False)
class TextRows:
    """Texts, chats, token ids and media with captions as documents of their own: for pretraining, fine-tuning and
    distillation.
    """

    encoder: ChatEncoder
    takes: ClassVar[tuple[type, ...]] = (Prose, Chat, Tokens, Captioned)

    def __call__(self, sample: Prose | Chat | Tokens | Captioned) -> Group:
        """One document. BadRow as `ChatEncoder.encode`."""
        return Group((self.encoder.encode(sample).document(),))


@dataclass(frozen=True, eq=False)
class PreferenceRows:
    """A prompt with the answer that was chosen, and the same prompt with the rejected one; answers have labels.

    `share`: what both begin with stands in the pack once (`ftrain.tasks.shared_prompts`).
    """

    encoder: ChatEncoder
    share: bool = False
    takes: ClassVar[tuple[type, ...]] = (Preference,)

    def __call__(self, sample: Preference) -> Group:
        """Two documents, `side` 1 and -1. BadRow as `ChatEncoder.encode`."""
        chosen = _answered(self.encoder, sample.prompt, sample.chosen, sample.place)
        rejected = _answered(self.encoder, sample.prompt, sample.rejected, sample.place)
        return _pair(_marked(chosen, "side", 1), _marked(rejected, "side", -1), self.share)


@dataclass(frozen=True, eq=False)
class JudgedRows:
    """A prompt with the answer that was judged, and with an answer to another prompt; `share` as `PreferenceRows`."""

    encoder: ChatEncoder
    share: bool = False
    takes: ClassVar[tuple[type, ...]] = (Judged,)

    def __call__(self, samples: tuple[Judged, Judged]) -> Group:
        """Two documents, `judged` 1 or -1, and 2. `samples`: the row, and one whose answer is another's
        (`WithNeighbour`). BadRow as `ChatEncoder.encode`.
        """
        own, other = samples
        answered = _answered(self.encoder, own.prompt, own.completion, own.place)
        strange = _answered(self.encoder, own.prompt, other.completion, own.place)
        judged = _marked(answered, "judged", GOOD if own.good else BAD)
        return _pair(judged, _marked(strange, "judged", OTHER), self.share)


@dataclass(frozen=True, eq=False)
class ClassedRows:
    """Texts with a class."""

    encoder: ChatEncoder
    takes: ClassVar[tuple[type, ...]] = (Classed,)

    def __call__(self, sample: Classed) -> Group:
        """One document, `kind` one more than its class. BadRow as `ChatEncoder.encode`, and for a class below 0."""
        if sample.label < 0:
            raise BadRow(sample.place, "class", f"its class is {sample.label}: classes are numbered from 0")
        return Group((_marked(self.encoder.encode(Prose(sample.text, place=sample.place)), "kind", sample.label + 1),))


@dataclass(frozen=True, eq=False)
class PairRows:
    """A question, the text that answers it, and texts that do not, as documents of one pack."""

    encoder: ChatEncoder
    takes: ClassVar[tuple[type, ...]] = (Pair,)

    def __call__(self, sample: Pair) -> Group:
        """Documents with `part` 1, 2, and 3 for each further text. BadRow as `ChatEncoder.encode`."""
        texts = [(sample.query, QUERY), (sample.positive, POSITIVE), *((t, NEGATIVE) for t in sample.negatives)]
        encoded = [(self.encoder.encode(Prose(text, place=sample.place)), part) for text, part in texts]
        return Group(tuple(_marked(found, "part", part) for found, part in encoded))


@dataclass(frozen=True)
class WithNeighbour:
    """Rows of `samples` as pairs of a row and the next one; the last row's next is the first."""

    samples: Any

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.samples[index], self.samples[(index + 1) % len(self.samples)]


def _answered(encoder: ChatEncoder, prompt: Sequence[Message], answer: Sequence[Message], place: Place) -> Encoded:
    asked = [replace(message, train=False) for message in prompt]
    said = [replace(message, train=message.role == "assistant") for message in answer]
    return encoder.encode(Chat((*asked, *said), place=place))


def _pair(first: Document, second: Document, share: bool) -> Group:
    return Group(shared_documents(first, second) if share else (first, second))


def _marked(encoded: Encoded, leaf: str, value: int) -> Document:
    return encoded.document({leaf: np.full(len(encoded.ids), value, np.int64)})
