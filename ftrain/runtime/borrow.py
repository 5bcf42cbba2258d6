"""Leaves whose memory a reader in the background still needs: every use waits for it, a step only before it writes.

A save copies the state behind the next step. That step reads the same leaves, and writes its new state over them when
its gradients are there: the copy has the time between. So the leaves are *lent*: their objects change their class, as
those of donated leaves do, and whatever eager code does with one first waits until the reader is done. A jitted step
takes lent leaves as they are and waits just before the first op that writes over one.

Other tensor objects on the same memory, made before the loan, are not watched. Those that the reader reads by belong to
the loan: a step must tell them from what a user keeps (see `ftrain.runtime.other_holders`).
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
"""Smaller leaves are not worth a loan, and steps write over them early (counters): copy them."""


class Loan:
    """Leaves that are lent from now on until `end`; `waited` are the seconds that others have waited for that."""

    def __init__(self, leaves: Iterable[Tensor], reads: dict[str, Tensor] | None = None) -> None:
        """`leaves`: those for which `lendable` holds; `reads`: the reader's own tensors on their memory, which nobody
        else holds. The end of the loan empties the dict.
        """
        self.waited = 0.0
        self._reads = {} if reads is None else reads
        self._changing = threading.Lock()
        self._ended = threading.Event()
        self._leaves = list({id(leaf): leaf for leaf in leaves}.values())
        for leaf in self._leaves:
            leaf.__dict__["_loan"] = self
            leaf.__class__ = _LENT[type(leaf)]

    def end(self) -> None:
        """The reader is done: the leaves are what they were, and who waits goes on. From any thread, any number of
        times.
        """
        leaves, self._leaves = self._leaves, []
        for leaf in leaves:
            if leaf.__dict__.get("_loan") is self:
                _take_back(leaf)
                del leaf.__dict__["_loan"]
        with self._changing:
            self._reads.clear()
        self._ended.set()

    @contextmanager
    def as_it_is(self) -> Iterator[list[Tensor]]:
        """Within the block the loan does not end; yields the reader's tensors."""
        with self._changing:
            yield [*self._reads.values()]

    def wait(self) -> None:
        """Return when the loan has ended."""
        if not self._ended.is_set():
            began = time.perf_counter()
            self._ended.wait()
            self.waited += time.perf_counter() - began


def lendable(leaf: Any) -> bool:
    """True for plain tensors, parameters and DTensors (which are not lent already) of `LEAST_BYTES` and more."""
    if type(leaf) is DTensor:
        return leaf.to_local().nbytes >= LEAST_BYTES
    return type(leaf) in _LENT and leaf.nbytes >= LEAST_BYTES


@contextmanager
def taken_back(leaves: Sequence[Any]) -> Iterator[Mapping[int, Loan]]:
    """Within the block the leaves are plain again; yields the loans of those that were lent, by position.

    They may be read, and written when their loan has ended. That is waited for when the block is left.
    """
    loans = {i: loan for i, leaf in enumerate(leaves) if (loan := _loan_of(leaf)) is not None}
    for i in loans:
        _take_back(leaves[i])
    try:
        yield loans
    finally:
        for loan in set(loans.values()):
            loan.wait()


class Fence:
    """What a program calls before it first writes into its arguments."""

    def __init__(self) -> None:
        self._loans: set[Loan] = set()

    def expect(self, loans: Iterable[Loan]) -> None:
        """Loans that must have ended before the next write."""
        self._loans |= set(loans)

    def wait(self) -> None:
        """Return when they have ended."""
        while self._loans:
            self._loans.pop().wait()


def _first_wait(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """Any use of a lent leaf: wait for the end of the loan, then do what was asked for."""
    for given in torch.utils._pytree.tree_leaves((args, kwargs or {})):
        if (loan := _loan_of(given)) is not None:
            loan.wait()
    return func(*args, **(kwargs or {}))


class LentTensor(Tensor):
    """What a tensor object is while it is lent."""

    __torch_function__ = staticmethod(_first_wait)


class LentParameter(Parameter):
    """What a parameter is while it is lent."""

    __torch_function__ = staticmethod(_first_wait)


class LentDTensor(DTensor):
    """What a DTensor is while it is lent."""

    __slots__ = ()
    __torch_function__ = staticmethod(_first_wait)


_LENT: dict[type, type] = {Tensor: LentTensor, Parameter: LentParameter, DTensor: LentDTensor}
_PLAIN = {lent: plain for plain, lent in _LENT.items()}


def _loan_of(leaf: Any) -> Loan | None:
    return leaf.__dict__.get("_loan") if type(leaf) in _PLAIN else None


def _take_back(leaf: Tensor) -> None:
    leaf.__class__ = _PLAIN.get(type(leaf), type(leaf))
