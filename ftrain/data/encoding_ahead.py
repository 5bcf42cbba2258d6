"""Documents in the order of a run, read and encoded ahead by grain's worker processes or threads.

What comes out depends on neither. Documents travel from a worker in chunks, as a few long arrays.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ftrain.data.documents import Document, Group
from ftrain.data.order import Order, grain
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Part, Place

CHUNK = 32
"""Documents that a worker hands over at once, unless told otherwise."""


class Rows(Protocol):
    """What a source is: rows by number. `BadRow` for a row that cannot be read."""

    def __len__(self) -> int:
        """How many rows there are."""

    def __getitem__(self, index: int) -> Any:
        """Row `index`, from 0."""


Encode = Callable[[Any], Group | None]
"""From a row to what is trained on: a pure function. None, or `BadRow`, for a row that cannot be trained on."""


@dataclass(frozen=True)
class Workers:
    """Who encodes ahead of the training loop.

    - `processes`: 0 encodes in this process. Sources and `encode` travel there by cloudpickle.
    - `threads`: of each of them; 0 encodes when documents are asked for. For encoders that wait for files or release
      the interpreter, as media do.
    - `chunks`: how many chunks each process (or the threads) may be ahead.
    - `chunk`: documents of a chunk.
    - `finishing`: threads that finish documents, such as by decoding their media (`Loader.finish`); None: `threads`.

    ValueError for numbers below these.
    """

    processes: int = 0
    threads: int = 0
    chunks: int = 4
    chunk: int = CHUNK
    finishing: int | None = None

    def __post_init__(self) -> None:
        """ValueError for a negative number, or no chunk."""
        for name, least in (("processes", 0), ("threads", 0), ("chunks", 1), ("chunk", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"Workers: {name}={getattr(self, name)} must be at least {least}")


@dataclass(frozen=True, eq=False)
class Drawn:
    """A place of the order, and `where` its row stands in a file.

    `lengths`: of its documents, int64 `[n]`, empty where the row is `rejected`; `cost`: what its group says. The group
    itself is made when it is asked for, as views of what came from the worker.
    """

    place: int
    where: Place
    lengths: np.ndarray
    cost: float | None
    rejected: BadRow | None
    _chunk: "_Chunk"
    _first: int

    def group(self) -> Group:
        """The documents, as `encode` made them."""
        return Group(self._chunk.documents(self._first, len(self.lengths)), self.cost)


@dataclass(frozen=True)
class Places:
    """Places of an order: the `held` ones, which are read again, and then those from `first` to `last - 1`."""

    held: tuple[int, ...]
    first: int
    last: int

    def part(self, start: int, count: int) -> list[int]:
        """At most `count` of them, from number `start` on."""
        again = self.held[start : start + count]
        first = self.first + max(0, start - len(self.held))
        return [*again, *range(first, min(first + count - len(again), self.last))]

    def __len__(self) -> int:
        return len(self.held) + max(0, self.last - self.first)


def encode_ahead(
    order: Order, sources: Sequence[Rows], encode: Encode, *, places: Places, workers: Workers
) -> Generator[Drawn]:
    """The documents of these places, encoded, one after the other. Close it to end the workers.

    Raises:
        Exception: what a source or `encode` raises, when its place comes, but for `BadRow`.
    """
    if not len(places):
        return
    chunks = grain.MapDataset.source(_Chunks(order, sources, encode, places, workers.chunk))
    buffered = workers.chunks if workers.threads else 0
    reading = grain.ReadOptions(num_threads=workers.threads, prefetch_buffer_size=buffered)
    ahead = chunks.to_iter_dataset(reading)
    if workers.processes:
        options = grain.MultiprocessingOptions(workers.processes, per_worker_buffer_size=workers.chunks)
        ahead = ahead.mp_prefetch(options)
    reader = iter(ahead)
    try:
        for chunk in reader:
            yield from chunk.encoded()
    finally:
        reader.close()


def mean_tokens(source: Rows, encode: Encode, *, rows: int = 256) -> float:
    """Tokens of a row on average, of at most so many rows that lie evenly in the source: for `mixture.by_tokens`.

    ValueError where none of them can be trained on.
    """
    count = min(rows, len(source))
    found = []
    for number in range(count):
        try:
            group = encode(source[number * len(source) // count])
        except BadRow:
            continue  # told when it is its turn
        if group is not None and group.documents:
            found.append(len(group))
    if not found:
        raise ValueError(f"none of {count} rows can be trained on, so how long they are is unknown")
    return sum(found) / len(found)


@dataclass(frozen=True)
class _Chunks:
    """Chunks of places by number, for grain."""

    order: Order
    sources: Sequence[Rows]
    encode: Encode
    places: Places
    chunk: int

    def __len__(self) -> int:
        return -(-len(self.places) // self.chunk)

    def __getitem__(self, index: int) -> "_Chunk":
        places = self.places.part(int(index) * self.chunk, self.chunk)
        return _Chunk.of(places, [self._encoded(place) for place in places])

    def _encoded(self, place: int) -> tuple[Place, Group | BadRow]:
        source, number = self.order[place]
        where = Place(f"source {source}", number + 1)
        try:
            row = self.sources[source][number]
            found = getattr(row, "place", None)
            where = found if isinstance(found, Place) else where
            group = self.encode(row)
        except BadRow as error:
            return error.place, error
        if group is None or not group.documents:
            return where, BadRow(where, "nothing to train on", "it has nothing to train on")
        return where, group


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Places one after the other; the arrays of all their documents, joined by name where all have the same ones.

    `counts`: documents of each place; `ends`: int64, of each document in the joined arrays; `parts`, `media`: of each
    document, empty where none has some.
    """

    places: list[int]
    where: list[Place]
    counts: list[int]
    costs: list[float | None]
    rejected: dict[int, BadRow]
    ends: np.ndarray
    arrays: list[dict[str, np.ndarray]]
    parts: list[tuple[tuple[Part, Place], ...]]
    media: list[Mapping[str, np.ndarray]]

    @staticmethod
    def of(places: list[int], found: Sequence[tuple[Place, Group | BadRow]]) -> "_Chunk":
        groups = [made if isinstance(made, Group) else None for _, made in found]
        documents = [document for group in groups if group for document in group.documents]
        kinds = [(d.leaves.keys(), [(a.dtype, a.shape[1:]) for a in d.leaves.values()]) for d in documents]
        named = [{"tokens": d.tokens, "labels": d.labels, **d.leaves} for d in documents]
        if named and all(kind == kinds[0] for kind in kinds):
            named = [{name: np.concatenate([d[name] for d in named]) for name in named[0]}]
        return _Chunk(
            places,
            [where for where, _ in found],
            [len(group.documents) if group else 0 for group in groups],
            [group.cost if group else None for group in groups],
            {place: made for place, (_, made) in zip(places, found, strict=True) if isinstance(made, BadRow)},
            np.cumsum([len(document) for document in documents], dtype=np.int64),
            named,
            [d.parts for d in documents] if any(d.parts for d in documents) else [],
            [d.media for d in documents] if any(d.media for d in documents) else [],
        )

    def encoded(self) -> Iterator[Drawn]:
        """The places, in order."""
        lengths, first = np.diff(self.ends, prepend=0), 0
        for place, where, count, cost in zip(self.places, self.where, self.counts, self.costs, strict=True):
            rejected = self.rejected.get(place)
            yield Drawn(place, where, lengths[first : first + count], cost, rejected, self, first)
            first += count

    def documents(self, first: int, count: int) -> tuple[Document, ...]:
        """So many documents from number `first` on."""
        return tuple(self._document(number) for number in range(first, first + count))

    def _document(self, number: int) -> Document:
        arrays = self.arrays[0]
        if len(self.arrays) > 1:
            arrays = self.arrays[number]
        elif len(self.ends) > 1:
            start = int(self.ends[number - 1]) if number else 0
            arrays = {name: array[start : int(self.ends[number])] for name, array in arrays.items()}
        leaves = {name: array for name, array in arrays.items() if name not in ("tokens", "labels")}
        parts, media = self.parts[number] if self.parts else (), self.media[number] if self.media else {}
        return Document(arrays["tokens"], arrays["labels"], leaves, parts, media)
