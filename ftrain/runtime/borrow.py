"""Leaves whose memory a reader in the background still needs: every use waits for it, a step only before it writes.

A save copies the state behind the next step. That step reads the same leaves, and writes its new state over them when
its gradients are there: the copy has the time between. So the leaves are *borrowed*: their objects change their class, as
those of donated leaves do, and whatever eager code does with one first waits until the reader is done. A jitted step
takes borrowed leaves as they are and waits just before the first op that writes over one.

Other tensor objects on the same memory, made before the borrow, are not watched. Those that the reader reads by belong to
the borrow: a step must tell them from what a user keeps (see `ftrain.runtime.other_holders`).
"""

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

LEAST_BYTES = 2**16
"""Smaller leaves are not worth a borrow, and steps write over them early (counters): copy them."""


class Borrow:
    """Leaves that are borrowed from now on until `end`; `waited` are the seconds that others have waited for that."""

    def __init__(self, leaves: Iterable[Tensor], reads: dict[str, Tensor] | None = None) -> None:
        """`leaves`: those for which `borrowable` holds; `reads`: the reader's own tensors on their memory, which nobody
        else holds. The end of the borrow empties the dict.
        """
        self.waited = 0.0
        self._reads = {} if reads is None else reads
        self._changing = threading.Lock()
        self._ended = threading.Event()
        self._leaves = list({id(leaf): leaf for leaf in leaves}.values())
        for leaf in self._leaves:
            leaf.__dict__["_borrow"] = self
            leaf.__class__ = _BORROWED[type(leaf)]

    def end(self) -> None:
        """The reader is done: the leaves are what they were, and who waits goes on. From any thread, any number of
        times.
        """
        leaves, self._leaves = self._leaves, []
        for leaf in leaves:
            if leaf.__dict__.get("_borrow") is self:
                _make_plain(leaf)
                del leaf.__dict__["_borrow"]
        with self._changing:
            self._reads.clear()
        self._ended.set()

    @contextmanager
    def held_open(self) -> Iterator[list[Tensor]]:
        """Within the block the borrow does not end; yields the reader's tensors."""
        with self._changing:
            yield [*self._reads.values()]

    def wait(self) -> None:
        """Return when the borrow has ended."""
        if not self._ended.is_set():
            began = time.perf_counter()
            self._ended.wait()
            self.waited += time.perf_counter() - began


def borrowable(leaf: Any) -> bool:
    """True for plain tensors, parameters and DTensors (which are not borrowed already) of `LEAST_BYTES` and more."""
    if type(leaf) is DTensor:
        return leaf.to_local().nbytes >= LEAST_BYTES
    return type(leaf) in _BORROWED and leaf.nbytes >= LEAST_BYTES


@contextmanager
def plain_leaves(leaves: Sequence[Any]) -> Iterator[Mapping[int, Borrow]]:
    """Within the block the leaves are plain again; yields the borrows of those that were borrowed, by position.

    They may be read, and written when their borrow has ended. That is waited for when the block is left.
    """
    borrows = {i: borrow for i, leaf in enumerate(leaves) if (borrow := _borrow_of(leaf)) is not None}
    for i in borrows:
        _make_plain(leaves[i])
    try:
        yield borrows
    finally:
        for borrow in set(borrows.values()):
            borrow.wait()


class Fence:
    """What a program calls before it first writes into its arguments."""

    def __init__(self) -> None:
        self._borrows: set[Borrow] = set()

    def add(self, borrows: Iterable[Borrow]) -> None:
        """Loans that must have ended before the next write."""
        self._borrows |= set(borrows)

    def wait(self) -> None:
        """Return when they have ended."""
        while self._borrows:
            self._borrows.pop().wait()


def _first_wait(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """Any use of a borrowed leaf: wait for the end of the borrow, then do what was asked for."""
    for given in torch.utils._pytree.tree_leaves((args, kwargs or {})):
        if (borrow := _borrow_of(given)) is not None:
            borrow.wait()
    return func(*args, **(kwargs or {}))


class BorrowedTensor(Tensor):
    """What a tensor object is while it is borrowed."""

    __torch_function__ = staticmethod(_first_wait)


class BorrowedParameter(Parameter):
    """What a parameter is while it is borrowed."""

    __torch_function__ = staticmethod(_first_wait)


class BorrowedDTensor(DTensor):
    """What a DTensor is while it is borrowed."""

    __slots__ = ()
    __torch_function__ = staticmethod(_first_wait)


_BORROWED: dict[type, type] = {Tensor: BorrowedTensor, Parameter: BorrowedParameter, DTensor: BorrowedDTensor}
_PLAIN = {borrowed: plain for plain, borrowed in _BORROWED.items()}


def _borrow_of(leaf: Any) -> Borrow | None:
    return leaf.__dict__.get("_borrow") if type(leaf) in _PLAIN else None


def _make_plain(leaf: Tensor) -> None:
    leaf.__class__ = _PLAIN.get(type(leaf), type(leaf))
