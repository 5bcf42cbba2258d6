"""What data files hold: rows, rejected rows, lengths in tokens, and how much of them is trained on."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ftrain.data.encoding import ChatEncoder, Encoded
from ftrain.data.rejects import BadRow, RejectedKind, Rejects
from ftrain.data.sample import Captioned, Chat, Classed, Judged, Pair, Preference, Prose, Sample, Tokens
from ftrain.data.samples import Samples

_BARS = 12


@dataclass(frozen=True)
class Bar:
    """Rows with more than `above` and at most `upto` tokens, and the tokens of all of them."""

    above: int
    upto: int
    rows: int
    tokens: int


@dataclass(frozen=True)
class Stats:
    """What was counted. `tokens`, `trained` and `bars` are there where a tokenizer was given, else 0 and empty."""

    format: str
    rows: int
    taken: int
    rejected: tuple[RejectedKind, ...]
    tokens: int = 0
    trained: int = 0
    longest: int = 0
    bars: tuple[Bar, ...] = field(default=())

    @property
    def share_trained(self) -> float:
        """Trained tokens of all, from 0 to 1."""
        return self.trained / self.tokens if self.tokens else 0.0


def texts_of(sample: Sample) -> Iterator[Chat | Prose | Tokens | Captioned]:
    """What of a sample is put into tokens: both ends of a preference, the judged chat, each text of a pair."""
    place = sample.place
    match sample:
        case Preference(prompt, chosen, rejected):
            yield from (Chat((*prompt, *end), place=place) for end in (chosen, rejected))
        case Judged(prompt, completion):
            yield Chat((*prompt, *completion), place=place)
        case Pair(query, positive, negatives):
            yield from (Prose(text, place=place) for text in (query, positive, *negatives))
        case Classed(text):
            yield Prose(text, place=place)
        case _:
            yield sample


def count(samples: Samples, encoder: ChatEncoder | None = None, *, rows: int | None = None) -> Stats:
    """Read all rows, or the first ones, and count; with an encoder tokens too.

    ValueError where the chat template cannot be used at all, or a file cannot be read. Rejected rows are only counted.
    """
    rejects = Rejects(limit=1.0)
    looked_at = len(samples) if rows is None else min(rows, len(samples))
    lengths: list[int] = []
    trained = 0
    for index in range(looked_at):
        try:
            encoded = [encoder.encode(text) for text in texts_of(samples[index])] if encoder else _read(samples, index)
        except BadRow as error:
            rejects.add(error)
            continue
        rejects.took()
        lengths.append(sum(len(one.ids) for one in encoded))
        trained += sum(int(one.trained[1:].sum()) for one in encoded)
    array = np.asarray(lengths if encoder else [], np.int64)
    total, longest = int(array.sum()), int(array.max(initial=0))
    rejected = tuple(rejects)
    return Stats(samples.format.name, looked_at, len(lengths), rejected, total, trained, longest, _bars(array))


def _read(samples: Samples, index: int) -> list[Encoded]:
    samples[index]
    return []


def _bars(lengths: np.ndarray) -> tuple[Bar, ...]:
    """Bars of powers of two."""
    if not len(lengths):
        return ()
    numbers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    first = max(int(numbers.min()), int(numbers.max()) - _BARS + 1)
    numbers = np.maximum(numbers, first)
    return tuple(
        Bar(0 if n == first else 2 ** (n - 1), 2**n, int((numbers == n).sum()), int(lengths[numbers == n].sum()))
        for n in range(first, int(numbers.max()) + 1)
    )
