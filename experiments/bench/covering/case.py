"""What a row of the coverage bench is given: a model of the bridge, and what the plain module computes by itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ftrain.modules.model import Model
from ftrain.modules.spec import Tree
from ftrain.sharding.batch import BatchRule

Expected = Callable[[], tuple[float, Mapping[str, Tensor]]]


class NoPeer(Exception):
    """There is nothing to compare with: the plain module does not run by itself, in the words of its library."""


@dataclass(frozen=True)
class Shared:
    """A batch for a sequence axis of two ranks, which share a document: one runs across the middle of the pack."""

    batch: Tree
    expected: Expected


@dataclass(frozen=True)
class Built:
    """A model and what it is compared with, in float32.

    - `model`: the bridge's. `params`: the plain module's own parameters, as the tree of `model.specs`.
    - `batch`: what `model.loss` takes. `expected()`: of the plain module, eager: the loss, and its gradients by dotted
      name (one that is absent or None is zero).
    - `splits`: which of "sequence" and "expert" apply. `shared`: the batch for "sequence"; None: `batch`.
    - `roundtrip()`: save, load back in the peer's library with strict names; raises if something is not equal.
    - `key`: int64 `[2]` for dropout, where the row is about it.
    - `rules`: how leaves of the batch are divided that are not by rows, as `Plan(batch=...)` takes them.
    - `about`: what the row is on, in a word or two ("packed", "rows").
    """

    model: Model
    params: Tree
    batch: Tree
    expected: Expected
    splits: frozenset[str] = frozenset()
    roundtrip: Callable[[], None] | None = None
    shared: Shared | None = None
    key: Tensor | None = None
    rules: Mapping[str, BatchRule] = field(default_factory=dict)
    about: str = ""


@dataclass(frozen=True)
class Case:
    """A row: the set that it belongs to, its name within the set, and how it is made.

    `build()` raises `NoPeer` where the plain module does not run by itself on a small configuration; such a row is
    counted apart.
    """

    set: str
    name: str
    build: Callable[[], Built]


def nothing_to_compare(run: Callable[[], Any]) -> Any:
    """What `run()` gives, of the peer's library alone; its errors are `NoPeer`."""
    try:
        return run()
    except Exception as error:
        raise NoPeer(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
