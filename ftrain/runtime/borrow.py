"""Leaves whose memory a background reader still needs: eager code waits for the reader, a step waits only before it
writes.

A save copies the state while the next step runs. That step reads the same leaves first, and writes its new state over
them once its gradients exist; the copy has the time between. So the reader *borrows* the leaves: the class of each leaf
object changes, as it does for donated leaves, and eager code that uses one first waits until the reader is done. A
jitted step takes borrowed leaves as they are, and waits just before the first op that writes over one.

Other tensor objects on the same memory, made before the borrow, are not watched. The reader's own tensors belong to the
borrow: a step must tell them from what a user keeps (see `ftrain.runtime.other_holders`).
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
"""Smaller leaves are not worth borrowing, and steps write over them early (counters): copy them."""


class Borrow:
    """Leaves that are borrowed from now on until `end`. `waited`: seconds that others have waited for the end."""

    def __init__(self, leaves: Iterable[Tensor], reads: dict[str, Tensor] | None = None) -> None:
        """`leaves`: tensors for which `borrowable` is True. `reads`: the reader's own tensors on their memory, which
        nobody else holds; the dict is emptied at the end of the borrow.
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
        """End the borrow: the leaves get their classes back, and whoever waits goes on. From any thread, any number of
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
    """True for plain tensors, parameters and DTensors of at least `LEAST_BYTES` that are not borrowed already."""
    if type(leaf) is DTensor:
        return leaf.to_local().nbytes >= LEAST_BYTES
    return type(leaf) in _BORROWED and leaf.nbytes >= LEAST_BYTES


@contextmanager
def plain_leaves(leaves: Sequence[Any]) -> Iterator[Mapping[int, Borrow]]:
    """Within the block the borrowed leaves have their classes back; yields the borrows of these leaves by position.

    They may be read at once, and written when their borrow has ended. The end of the block waits for that.
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
    """Holds a program back before it first writes into its arguments."""

    def __init__(self) -> None:
        self._borrows: set[Borrow] = set()

    def add(self, borrows: Iterable[Borrow]) -> None:
        """Add borrows that must have ended before the next write."""
        self._borrows |= set(borrows)

    def wait(self) -> None:
        """Return when all of them have ended."""
        while self._borrows:
            self._borrows.pop().wait()


def _first_wait(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """Any use of a borrowed leaf: wait for the end of the borrow, then run `func`."""
    for given in torch.utils._pytree.tree_leaves((args, kwargs or {})):
        if (borrow := _borrow_of(given)) is not None:
            borrow.wait()
    return func(*args, **(kwargs or {}))


class BorrowedTensor(Tensor):
    """The class of a tensor object while it is borrowed."""

    __torch_function__ = staticmethod(_first_wait)


class BorrowedParameter(Parameter):
    """The class of a parameter while it is borrowed."""

    __torch_function__ = staticmethod(_first_wait)


class BorrowedDTensor(DTensor):
    """The class of a DTensor while it is borrowed."""

    __slots__ = ()
    __torch_function__ = staticmethod(_first_wait)


_BORROWED: dict[type, type] = {Tensor: BorrowedTensor, Parameter: BorrowedParameter, DTensor: BorrowedDTensor}
_PLAIN = {borrowed: plain for plain, borrowed in _BORROWED.items()}


def _borrow_of(leaf: Any) -> Borrow | None:
    return leaf.__dict__.get("_borrow") if type(leaf) in _PLAIN else None


def _make_plain(leaf: Tensor) -> None:
    leaf.__class__ = _PLAIN.get(type(leaf), type(leaf))
