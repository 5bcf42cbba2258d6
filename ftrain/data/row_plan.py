"""Which documents share a step where each is a row of its own, `[B, L]`: for models that cannot keep documents of a
pack apart, or that read media by rows. Pure functions of sizes.

A step's packs are all of one shape, so that ranks and micro-batches share one program: B rows of L tokens, and as many
tokens of each kind of media in every row. What a row lacks is padding, and media that nobody sees
(`ftrain.data.layout`). Lengths and numbers of media are rounded up to few sizes, so a run has few shapes.

Legend: N groups of the buffer, K kinds of media, P packs of a step, B rows of a pack, L tokens of a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ftrain.data.packing import Plan, Shape
from ftrain.modules.dealing import eased

_FINE = 32  # parts of the budget by which sizes are rounded up, where those of the ladder do not fit into it


class RowGroup(NamedTuple):
    """Sizes of a group: `tokens` of all its documents together, `text` the most tokens of one that stand for no media,
    `media` the most tokens of one of each kind of media, and how many `documents`, each a row. `seen`: what encoders
    compute of all its media, in units of a token, `longest`: a bound of the tokens of a piece of them
    (`ftrain.data.layout.Stream`).
    """

    tokens: int
    text: int
    media: tuple[int, ...]
    documents: int
    seen: float = 0.0
    longest: int = 0


def rounded(count: int, unit: int = 1) -> int:
    """The next number of units that is a power of two or three halves of one, as a number of tokens; 0 stays.

    >>> [rounded(n) for n in (0, 1, 3, 5, 7, 90)], rounded(300, unit=256)
    ([0, 1, 3, 6, 8, 96], 512)
    """
    units = -(-count // unit)
    return unit * eased(units) if units else 0


def shape_of(group: RowGroup, *, tokens: int, units: Sequence[int]) -> Shape:
    """The shape of a pack for groups like this one.

    `tokens`: of a pack, at most so many in all its rows together; a row may be longer by some hundredths where its
    media are rounded up. `units`: tokens of the smallest piece of each kind of media.

    >>> shape_of(RowGroup(90, 30, (60,), 1), tokens=1024, units=(1,))
    Shape(length=96, rows=10, media=(64,))
    """
    media = tuple(rounded(n, unit) for n, unit in zip(group.media, units, strict=True))
    if _row(group.text, media) > tokens:
        fine = max(1, tokens // _FINE)
        media = tuple(_up(n, unit * -(-fine // unit)) for n, unit in zip(group.media, units, strict=True))
    if _row(group.text, media) > tokens and any(unit > 1 for unit in units):
        media = tuple(_up(n, unit) for n, unit in zip(group.media, units, strict=True))
    length = rounded(_row(group.text, media))
    if length > tokens:
        length = max(tokens, _up(_row(group.text, media), max(1, tokens // _FINE)))
    return Shape(length, max(tokens // length, group.documents, 1), media)


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _row(text: int, media: Sequence[int]) -> int:
    """Tokens of a row. Media that fill it up stand behind its document, with a token between."""
    return text + sum(media) + sum(1 for n in media if n)


def plan_rows(groups: Sequence[RowGroup], *, tokens: int, packs: int, units: Sequence[int] = ()) -> Plan:
    """The packs of the next step, from groups in a buffer, the oldest first, which is always taken.

    Its shape is that of the oldest group. Rows go to groups of the same shape, then to the longest of the others that
    fit. The result depends on the arguments alone.

    >>> plan = plan_rows([RowGroup(n, n, (), 1) for n in (5, 60, 6, 3)], tokens=16, packs=1)
    >>> plan.pack_N.tolist(), plan.shape
    ([0, -1, 0, -1], Shape(length=6, rows=2, media=()))
    """
    pack_N, used_P = np.full(len(groups), -1, np.int64), np.zeros(packs, np.int64)
    if not groups:
        return Plan(pack_N, used_P, np.zeros(packs), Shape(tokens, 1))
    shapes = [shape_of(group, tokens=tokens, units=units) for group in groups]
    shape = shapes[0]
    fit = [i for i, group in enumerate(groups) if _fits(group, shape)]
    fit.sort(key=lambda i: (i != 0, shapes[i] != shape, -shapes[i].length, i))
    rows_P = np.zeros(packs, np.int64)
    for i in fit:
        pack = int(np.argmin(rows_P))
        if rows_P[pack] + groups[i].documents <= shape.rows:
            pack_N[i], rows_P[pack] = pack, rows_P[pack] + groups[i].documents
            used_P[pack] += groups[i].tokens
        if rows_P.min() == shape.rows:
            break
    return Plan(pack_N, used_P, np.full(packs, float(shape.places)), shape)


def _fits(group: RowGroup, shape: Shape) -> bool:
    fewer = all(n <= most for n, most in zip(group.media, shape.media, strict=True))
    return fewer and group.documents <= shape.rows and _row(group.text, shape.media) <= shape.length
