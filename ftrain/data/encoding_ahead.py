"""Documents in the order of a run, read and encoded ahead by grain's worker processes or threads.

What comes out depends on neither. Documents travel from a worker in chunks, as a few long arrays.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from ftrain.data.documents import Document, Group
from ftrain.data.order import Order, grain
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place

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

    ValueError for numbers below these.
    """

    processes: int = 0
    threads: int = 0
    chunks: int = 4
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        """ValueError for a negative number, or no chunk."""
        for name, least in (("processes", 0), ("threads", 0), ("chunks", 1), ("chunk", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"Workers: {name}={getattr(self, name)} must be at least {least}")


class Encoded(NamedTuple):
    """A place of the order, `where` its row stands in a file, and its `group`, or why it has none."""

    place: int
    where: Place
    group: Group | None
    rejected: BadRow | None


def encode_at(place: int, order: Order, sources: Sequence[Rows], encode: Encode) -> Encoded:
    """What is drawn at a place. What `encode` or a source raises goes through, but for `BadRow`."""
    source, number = order[place]
    where = Place(f"source {source}", number + 1)
    try:
        row = sources[source][number]
        found = getattr(row, "place", None)
        where = found if isinstance(found, Place) else where
        group = encode(row)
        if group is None or not group.documents:
            raise BadRow(where, "nothing to train on", "it has nothing to train on")
    except BadRow as error:
        return Encoded(place, error.place, None, error)
    return Encoded(place, where, group, None)


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
) -> Generator[Encoded]:
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
        return _Chunk.of([encode_at(place, self.order, self.sources, self.encode) for place in places])


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Places one after the other. Arrays of all their documents are joined by name; `documents` of each group."""

    places: list[tuple[int, Place]]
    documents: list[int]
    costs: list[float | None]
    rejected: dict[int, BadRow]
    lengths: np.ndarray
    arrays: list[dict[str, np.ndarray]]

    @staticmethod
    def of(found: Sequence[Encoded]) -> "_Chunk":
        """Joins the arrays of runs of documents that have the same leaves."""
        groups = [e.group.documents if e.group else () for e in found]
        documents = [document for group in groups for document in group]
        kinds = [(d.leaves.keys(), [(a.dtype, a.shape[1:]) for a in d.leaves.values()]) for d in documents]
        alike = all(kind == kinds[0] for kind in kinds[1:])
        named = [{"tokens": d.tokens, "labels": d.labels, **d.leaves} for d in documents]
        joined = [{n: np.concatenate([d[n] for d in named]) for n in named[0]}] if alike and named else named
        return _Chunk(
            [(e.place, e.where) for e in found],
            [len(group) for group in groups],
            [e.group.cost if e.group else None for e in found],
            {e.place: e.rejected for e in found if e.rejected},
            np.array([len(d) for d in documents], np.int64),
            joined,
        )

    def encoded(self) -> Iterator[Encoded]:
        """The places, in order; documents are views of the joined arrays."""
        documents = self._documents()
        for (place, where), count, cost in zip(self.places, self.documents, self.costs, strict=True):
            group = Group(tuple(next(documents) for _ in range(count)), cost) if count else None
            yield Encoded(place, where, group, self.rejected.get(place))

    def _documents(self) -> Iterator[Document]:
        ends = np.cumsum(self.lengths).tolist()
        joined = len(self.arrays) == 1
        for i, (end, length) in enumerate(zip(ends, self.lengths.tolist(), strict=True)):
            arrays = self.arrays[0] if joined else self.arrays[i]
            here = {n: a[end - length : end] for n, a in arrays.items()} if joined else arrays
            yield Document(here["tokens"], here["labels"], {n: a for n, a in here.items() if n not in _TEXT})


_TEXT = ("tokens", "labels")
