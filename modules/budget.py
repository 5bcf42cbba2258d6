"""What a pack of documents has room for, and what documents take of it.

Legend: N documents, D things that a budget limits (tokens, rows, targets, numbers of documents and of items).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd
from typing import NamedTuple

import numpy as np
import torch

from ftrain.kernels.documents import Documents

_GROWTH = 4  # a budget that is short grows by quarters, so that few sizes of arrays occur
_TOKENS_TOGETHER = 64


class Bound(NamedTuple):
    """At most `most` documents (or items of media) in a pack, of at most `longest` tokens (or rows); None: any."""

    most: int
    longest: int | None = None


@dataclass(frozen=True)
class Budget:
    """Sizes of the packed arrays: `tokens`, feature `rows` per encoder, `targets` per decoder.

    `bounds`, by "tokens" or an encoder's name: how many documents a pack takes, and how long they may be. They are
    sizes of arrays and grids too, so a run that sets them is traced once and its kernels do no empty work. Without them
    a pack takes any number, and the arrays grow by powers of two.
    """

    tokens: int
    rows: Mapping[str, int] = field(default_factory=dict)
    targets: Mapping[str, int] = field(default_factory=dict)
    bounds: Mapping[str, Bound] = field(default_factory=dict)

    def places(self, stream: str, size: int) -> int | None:
        """How many documents the offsets of `size` tokens (or rows) have room for, padding included; None: any."""
        bound = self.bounds.get(stream)
        if bound is None:
            return None
        return bound.most + (1 if bound.longest is None else size // bound.longest + 1)

    def documents(self, stream: str, ids_N: np.ndarray, *, packs: int = 1) -> Documents:
        """The documents of these ids, in `packs` equal packs."""
        bound = self.bounds.get(stream)
        return Documents.of(
            torch.from_numpy(ids_N),
            max_documents=self.places(stream, len(ids_N) // packs),
            longest=None if bound is None else bound.longest,
            packs=packs,
        )

    @property
    def limits(self) -> dict[str, int]:
        """All that it limits, keyed by the words of an error: "tokens", "image rows", "image items", ..."""
        flat = {"tokens": self.tokens}
        flat.update((_rows_of(name), count) for name, count in self.rows.items())
        flat.update((_targets_of(name), count) for name, count in self.targets.items())
        flat.update((_number_of(stream), bound.most) for stream, bound in self.bounds.items())
        return flat

    def grown(self, short: frozenset[str], *, parts: int, rows_per_token: Mapping[str, int]) -> "Budget":
        """This budget with a quarter more of each of `short` (keys of `limits`), which `parts` ranks can still divide.

        Rows stay whole tokens of the encoders (`rows_per_token`) in each part.
        """

        def more(what: str, count: int, multiple: int) -> int:
            return count + -(-max(1, count // _GROWTH) // multiple) * multiple if what in short else count

        return replace(
            self,
            tokens=more("tokens", self.tokens, gcd(self.tokens, _TOKENS_TOGETHER * parts)),
            rows={name: more(_rows_of(name), n, parts * rows_per_token[name]) for name, n in self.rows.items()},
            targets={name: more(_targets_of(name), n, parts) for name, n in self.targets.items()},
            bounds={
                stream: bound._replace(most=more(_number_of(stream), bound.most, 1))
                for stream, bound in self.bounds.items()
            },
        )


class Size(NamedTuple):
    """What a document takes of each budget; `items`: the rows of each item of media, by encoder."""

    tokens: int
    rows: dict[str, int]
    targets: dict[str, int]
    items: dict[str, list[int]]


class Needs(NamedTuple):
    """What documents take of a budget, `needs_ND`, and what it has, `limits_D`; int64. `names`: of the D things."""

    names: tuple[str, ...]
    needs_ND: np.ndarray
    limits_D: np.ndarray


def needs(sizes: Sequence[Size], budget: Budget) -> Needs:
    """What each document takes of all that the budget limits.

    ValueError for a document that alone exceeds the budget, or is longer than one of its bounds allows.
    """
    limits = budget.limits
    needs_ND = np.zeros((len(sizes), len(limits)), np.int64)
    for number, size in enumerate(sizes):
        _check_lengths(number, size, budget)
        wanted = _wanted(size, budget)
        over = [what for what, n in wanted.items() if n > limits.get(what, 0)]
        if over:
            words = ", ".join(f"{wanted[what]} {what} (the budget holds {limits.get(what, 0)})" for what in over)
            raise ValueError(f"document {number} needs {words}: give a larger budget or leave the document out")
        needs_ND[number] = [wanted.get(what, 0) for what in limits]
    return Needs(tuple(limits), needs_ND, np.array(list(limits.values()), np.int64))


def first_fit(found: Needs) -> tuple[list[int], list[int]]:
    """Which documents fit beside those already taken, in the given order, and which are left.

    >>> sizes = [Size(tokens, {}, {}, {}) for tokens in (6, 5, 4)]
    >>> first_fit(needs(sizes, Budget(10)))
    ([0, 2], [1])
    """
    taken, left, free_D = list[int](), list[int](), found.limits_D.copy()
    for number, need_D in enumerate(found.needs_ND):
        if (need_D > free_D).any():
            left.append(number)
            continue
        taken.append(number)
        free_D -= need_D
    return taken, left


def total_budget(sizes: Sequence[Size]) -> Budget:
    """The smallest budget that holds documents of these sizes.

    >>> total_budget([Size(5, {"image": 8}, {}, {"image": [8]}), Size(3, {}, {}, {})]).rows
    {'image': 8}
    """
    items = _total([{name: len(rows) for name, rows in size.items.items()} for size in sizes])
    return Budget(
        tokens=sum(size.tokens for size in sizes),
        rows=_total([size.rows for size in sizes]),
        targets=_total([size.targets for size in sizes]),
        bounds={"tokens": Bound(len(sizes)), **{name: Bound(count) for name, count in items.items()}},
    )


def _total(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {name: sum(c.get(name, 0) for c in counts) for name in dict.fromkeys(n for c in counts for n in c)}


def _wanted(size: Size, budget: Budget) -> dict[str, int]:
    """What a document takes, keyed as `limits`; numbers of documents and items only where they are bounded."""
    flat = {"tokens": size.tokens}
    flat.update((_rows_of(name), count) for name, count in size.rows.items())
    flat.update((_targets_of(name), count) for name, count in size.targets.items())
    numbers = {"tokens": 1, **{name: len(rows) for name, rows in size.items.items()}}
    flat.update((_number_of(stream), n) for stream, n in numbers.items() if stream in budget.bounds)
    return flat


def _rows_of(name: str) -> str:
    return f"{name} rows"


def _targets_of(name: str) -> str:
    return f"{name} targets"


def _number_of(stream: str) -> str:
    return "documents" if stream == "tokens" else f"{stream} items"


def _check_lengths(number: int, size: Size, budget: Budget) -> None:
    for stream, lengths in {"tokens": [size.tokens], **size.items}.items():
        bound = budget.bounds.get(stream)
        if bound is not None and bound.longest is not None and max(lengths) > bound.longest:
            what = "tokens" if stream == "tokens" else f"{stream} rows in one item"
            raise ValueError(
                f"document {number} has {max(lengths)} {what}, more than the budget's longest, {bound.longest}: raise "
                f"bounds[{stream!r}], or leave the document out"
            )
