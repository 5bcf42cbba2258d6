"""From data files to the batches of a run: samples, those held out, their documents, the packs of each step."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from ftrain.data.documents import Document, Group
from ftrain.data.encoding_ahead import Rows, Workers
from ftrain.data.finishing import Finish
from ftrain.data.layout import Layout, PackLayout
from ftrain.data.loader import Loader
from ftrain.data.mixture import by_temperature
from ftrain.data.order import Order
from ftrain.data.packing import Packing, Shape
from ftrain.data.rejects import BadRow, Rejects
from ftrain.data.samples import Samples, open_samples
from ftrain.data.subset import Subset, hold_out

_log = logging.getLogger("ftrain.run")
_DECODING = 4
"""Threads that decode media."""
_COUNTED = 2000
"""Rows whose tokens are counted before the run, to know about how many steps it has."""


class RowEncoder(Protocol):
    """From a row to its documents (`ftrain.tasks.rows`)."""

    takes: ClassVar[tuple[type, ...]]

    def __call__(self, sample: Any) -> Group: ...


@dataclass(frozen=True)
class DataOptions:
    """Which rows are trained on, and how they are packed."""

    data: tuple[str, ...]
    """Files, folders, globs or URLs; each is a source of its own."""
    format: str | None = None
    """The format of the rows; default: it is found in the first rows, and logged."""
    weights: tuple[float, ...] = ()
    """How often each source is drawn from; default: by its rows."""
    temperature: float | None = None
    """Draw from sources by size ** (1 / temperature): the higher, the more alike they are drawn."""
    held_out: float = 0.02
    """Share of each source's rows that is not trained on, whose loss is measured: at most 1000 rows. 0: none."""
    held_out_data: tuple[str, ...] = ()
    """Files whose loss is measured, in the place of a share of the data."""
    tokens: int = 1024
    """Tokens of a pack. A longer document is rejected, which is counted and logged, or cut (`cut`)."""
    packs: int | None = None
    """Packs in a step, over all ranks; default: as many for each rank with a batch of its own as it takes for 4."""
    cut: Literal["never", "split"] = "never"
    """split: a document longer than a pack becomes several."""
    epochs: int | None = None
    """How often each document is trained on; default: once, or until `steps`."""
    steps: int | None = None
    """Where the run ends at the latest."""
    workers: int = 0
    """Processes that read and tokenise ahead; 0: this one. Media are decoded by threads, a step ahead."""
    image_pixels: int | None = None
    """The most pixels of a picture, which is made smaller to fit; default: what the model's folder says."""
    cache_media: Path | None = None
    """A folder for what frozen towers make of media: filled before the first step, then read in the place of running
    them."""
    rejected: float = 0.05
    """The share of rows that may be broken before the run stops."""


@dataclass(frozen=True)
class RunData:
    """A run's `loader`, the `held_out` batches, `steps` (about, where the data ends the run), and lines for the log."""

    loader: Loader
    held_out: "HeldOut"
    steps: int
    lines: tuple[str, ...]

    def rows(self) -> Iterator[Callable[[], Any]]:
        """All rows, those that are held out too, to be read by a call."""
        yield from _spread(self.loader.sources, 1)
        yield from self.held_out.rows()


def make_data(
    options: DataOptions,
    encode: RowEncoder,
    *,
    ranks: int,
    seed: int,
    paired: Callable[[Samples], Any] | None = None,
    leaves: Mapping[str, np.dtype] | None = None,
    layout: Layout | None = None,
    finish: Finish | None = None,
    others: Finish | None = None,
    mine: int = 0,
) -> RunData:
    """The data of a run.

    Args:
        options: which rows, and how they are packed.
        encode: from a row to its documents.
        ranks: that have a batch of their own.
        seed: of the order and of what is held out.
        paired: from samples to the rows that `encode` takes, where these are not single samples.
        leaves: names and dtypes of leaves that the documents have beside tokens and labels.
        layout: how documents lie in a batch; None: in packs.
        finish: what is done with documents when their turn comes, as their media are read; None: nothing.
        others, mine: what is done with documents of other ranks than number `mine`; None: the same.

    ValueError for data that cannot be read, is of another kind than the task's, or does not fill the ranks.
    """
    _require_positive(options)
    packs = options.packs or ranks * math.ceil(4 / ranks)
    if packs % ranks:
        raise ValueError(f"--packs {packs} do not divide among {ranks} ranks: give a multiple of {ranks}")
    packing = Packing(options.tokens, ranks=ranks, micro_batches=packs // ranks, cut=options.cut)
    opened = [open_samples(spec, format=options.format, kinds=encode.takes) for spec in options.data]
    rows = [paired(samples) if paired is not None else samples for samples in opened]
    share = 0.0 if options.held_out_data else options.held_out
    parts = [hold_out(source, share, key=seed) for source in rows]
    trained, held = [part[0] for part in parts], [part[1] for part in parts]
    if options.held_out_data:
        beside = [open_samples(spec, format=options.format, kinds=encode.takes) for spec in options.held_out_data]
        held = [hold_out(paired(samples) if paired else samples, 0.0, key=seed)[0] for samples in beside]
        _require_usable(held, encode, options.held_out_data)
    sizes = [len(source) for source in trained]
    order = Order(sizes, key=seed, weights=_weights(options, sizes))
    loader = Loader(
        order, trained, encode, packing, rank=None, epochs=_epochs(options), steps=options.steps,
        workers=Workers(processes=options.workers, finishing=_DECODING),
        rejects=Rejects(limit=options.rejected), leaves=leaves, layout=layout or PackLayout(), finish=finish,
        others=others, mine=mine,
    )  # fmt: skip
    lines = [
        f"{spec}: {len(samples):,} rows of the format {samples.format.name}"
        for spec, samples in zip(options.data, opened, strict=True)
    ]
    counted = _counted(trained, encode, loader.layout, packing, limit=options.rejected)
    scale = sum(sizes) / counted.rows
    tokens = round(sum(counted.lengths) * scale)
    ahead = max(packs * options.tokens, min(packing.waiting, tokens // 2))  # no document twice within half an epoch
    loader = replace(loader, slots=counted.most_in(options.tokens), packing=replace(packing, buffer=ahead))
    epoch = max(1, math.ceil(round(counted.room * scale) / (packs * options.tokens)))
    steps = options.steps or epoch * (options.epochs or 1)
    exact = "" if counted.rows == sum(sizes) else "about "
    lines.append(f"{sum(sizes):,} rows are trained on and {sum(map(len, held)):,} held out; {exact}{tokens:,} tokens, "
                 f"{packs} packs of {options.tokens} a step, {exact}{epoch:,} steps an epoch")  # fmt: skip
    if any(shape.rows for shape in counted.shapes):
        shapes = sorted(counted.shapes)
        lines.append(f"each document is a row: {_number(len(shapes), 'shape')} of packs: {'; '.join(map(str, shapes))}")
    if counted.rejects.count:
        kinds = "; ".join(map(str, counted.rejects))
        lines.append(f"{counted.rejects.count:,} of {counted.rows:,} rows are left out: {kinds}")
    return RunData(loader, _held_out(held, replace(loader, packing=packing)), steps, tuple(lines))


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _require_positive(options: DataOptions) -> None:
    for name in ("tokens", "packs", "epochs", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")


def _epochs(options: DataOptions) -> int | None:
    return options.epochs if options.epochs or options.steps else 1


def _weights(options: DataOptions, sizes: Sequence[int]) -> Sequence[float] | None:
    if options.weights and options.temperature is not None:
        raise ValueError("--weights and --temperature both say how often sources are drawn from: give one")
    if options.temperature is not None:
        return by_temperature(sizes, options.temperature)
    return options.weights or None


@dataclass(frozen=True)
class _Counted:
    """Of `rows` that were looked at: `lengths` of those that can be used, in tokens, and the most documents of one;
    `rejects` has the others. `room`: what of the budgets of packs they take, in tokens; `shapes`: of packs.
    """

    rows: int
    lengths: tuple[int, ...]
    documents: int
    rejects: Rejects
    room: int
    shapes: frozenset[Shape]

    def most_in(self, tokens: int) -> int:
        """The most documents that a pack can have, and twice that, as a power of two, where not all rows are known."""
        ends = np.cumsum(np.sort(np.asarray(self.lengths)))
        most = int(np.searchsorted(ends, tokens, side="right")) + 1
        return 1 << (2 * self.documents * most - 1).bit_length()


@dataclass(frozen=True)
class _Whole:
    """A group that waits for nothing (`ftrain.data.layout.Sized`)."""

    whole: Group

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(document) for document in self.whole.documents], np.int64)

    def group(self, tokens: int) -> Group:
        del tokens
        return self.whole


def _counted(
    sources: Sequence[Subset], encode: RowEncoder, layout: Layout, packing: Packing, *, limit: float
) -> _Counted:
    """Rows spread over all of the data, encoded. ValueError where none can be used, or where all rows were looked at
    and too many cannot.
    """
    lengths, documents, all_rows = list[int](), 1, sum(map(len, sources))
    rejects, last = Rejects(limit=limit, after=all_rows + 1, told=False), None  # the loader tells of them
    room, shapes = 0, set[Shape]()
    for row in _spread(sources, max(1, all_rows // _COUNTED)):
        try:
            group = encode(row())
        except BadRow as error:
            rejects.add(error)
            last = error
            continue
        rejects.took()
        lengths.append(len(group))
        documents = max(documents, len(group.documents))
        shape = layout.shape(layout.sizes(_Whole(group), packing), packing)
        shapes.add(shape)
        room += -(-packing.tokens * len(group.documents) // shape.rows) if shape.rows else len(group)
    if not lengths:
        raise ValueError(f"none of {rejects.rows} rows can be trained on; the last one: {last}")
    if rejects.rows == all_rows:
        rejects.finish()
    return _Counted(rejects.rows, tuple(lengths), documents, rejects, room, frozenset(shapes))


def _spread(sources: Sequence[Rows], every: int) -> Iterator[Callable[[], Any]]:
    for source in sources:
        for index in range(0, len(source), every):
            yield partial(source.__getitem__, index)


class HeldOut:
    """The batches of all rows that are held out, in their order. Those with media are made anew at each reading."""

    def __init__(self, loader: Loader | None) -> None:
        """`loader`: of these rows alone, once; None: there is none that can be used."""
        self._loader = loader
        kept = loader is not None and loader.finish is None
        self._kept = tuple(step.batch for step in loader) if loader is not None and kept else ()

    def __bool__(self) -> bool:
        return self._loader is not None

    def rows(self) -> Iterator[Callable[[], Any]]:
        """The rows, to be read by a call."""
        return _spread(self._loader.sources if self._loader is not None else (), 1)

    def documents(self) -> Iterator[Document]:
        """The documents, in the order of their rows, with their media; those that cannot be used are left out."""
        made = self._loader
        for row in self.rows():
            try:
                group = None if made is None else made.encode(row())
                if made is not None and made.finish is not None and group is not None:
                    group = made.finish(group)
            except BadRow:
                continue  # told when batches are made of it
            yield from () if group is None else group.documents

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        if self._loader is None or self._loader.finish is None:
            return iter(self._kept)
        return (step.batch for step in self._loader)


def _held_out(sources: Sequence[Subset], like: Loader) -> HeldOut:
    """Batches as a loader of the run makes them; rows that cannot be used are counted and logged."""
    usable = [source for source in sources if any(_is_usable(row, like.encode) for row in _spread([source], 1))]
    rejects = Rejects(limit=1.0)
    unusable = sum(map(len, sources)) - sum(map(len, usable))
    loader = None
    if usable:
        order = Order([len(source) for source in usable], key=0, shuffle=False)
        loader = replace(
            like, order=order, sources=usable, packing=replace(like.packing, patience=0), epochs=1, steps=None,
            workers=replace(like.workers, processes=0), rejects=rejects,
        )  # fmt: skip
    found = HeldOut(loader)
    if rejects.count + unusable:
        rows = sum(map(len, sources))
        _log.warning("%d of %d held-out rows cannot be used", rejects.count + unusable, rows)
    return found


def _require_usable(sources: Sequence[Subset], encode: RowEncoder, names: Sequence[str]) -> None:
    """ValueError for held-out data that was asked for and of which nothing can be used."""
    for source, name in zip(sources, names, strict=True):
        if not any(_is_usable(row, encode) for row in _spread([source], 1)):
            raise ValueError(
                f"--held-out-data {name}: none of {len(source)} rows can be used; `ftrain data stats` says why"
            )


def _is_usable(row: Callable[[], Any], encode: Callable[[Any], Any]) -> bool:
    try:
        encode(row())
    except BadRow:
        return False
    return True
