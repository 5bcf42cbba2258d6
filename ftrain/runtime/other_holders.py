"""Who else holds the memory that a step writes over: a value that somebody kept of a leaf must not change.

`old = state["w"].detach()`, a view, `w.numpy()`, a module that got the parameter: eager code leaves their values alone,
and a step that writes its new state over the old one would change them. Each of them is a reference to the leaf's
memory, which torch counts. So every call counts the references, and a leaf with a reference that is not the trainer's
own is copied first. Memory that torch did not allocate (`torch.from_numpy`, a mapped file) is not counted: such a leaf
is copied the first time.

Two things cannot be seen: bare addresses (`data_ptr`), and other libraries that use CUDA memory through
`__cuda_array_interface__`.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ftrain.graph.text import show_bytes
from ftrain.graph.torch_memory import (
    References,
    references,
    storage_id,
    storage_ids,
    weak_reference,
)
from ftrain.runtime.argument_memory import ArgumentMemory
from ftrain.runtime.borrow import Borrow
from ftrain.runtime.donation import empty_all_on

OwnReferences = Callable[[int], int | None]
"""From the position of an input to the number of further references of the trainer's own to its memory, e.g. by a
DTensor around a padded piece; None where the input came from elsewhere, so that the number is unknown.
"""


def _no_own_references(slot: int) -> int | None:
    return 0


class OtherHolders:
    """Looks for references to the memory of donated leaves. In the steady state one comparison of counts finds none."""

    def __init__(
        self, name: str, paths: Sequence[str], donated: Collection[int], arguments: ArgumentMemory | None = None
    ) -> None:
        """`name`: of the step. `paths`: of its inputs; `donated`: positions of those that are written over.
        `arguments`: the memory of them that its program holds.
        """
        self._name, self._paths, self._arguments = name, paths, arguments
        self._slots = list(donated)
        one = references([torch.empty(1)])[1]
        self._alone = References(*(counts[0:1] * len(self._slots) for counts in one))
        self._known: list[int] = []
        self._expected = self._alone
        self._anchors: list[Any] = []
        self._changes = 0
        self._warned = False
        self.old_are_kept = False
        """Whether somebody keeps donated leaves. They are then emptied at once, since finding them later is slow."""

    def known_unshared(self, inputs: Sequence[Tensor]) -> bool:
        """True if the donated inputs lie in memory that was checked before and has no other holder, so that none of
        them shares memory with another one either. False where a closer look is needed.
        """
        ids, found = references([inputs[slot] for slot in self._slots])
        return ids == self._known and found == self._expected and self._changes == self._changes_now()

    def forget(self) -> None:
        """Look closer at the next call, as the trainer's own references to the leaves have changed."""
        self._known = []

    def copy_shared(
        self,
        inputs: list[Tensor],
        *,
        copies: Collection[int] = (),
        borrows: Iterable[Borrow] = (),
        own_references: OwnReferences = _no_own_references,
    ) -> list[Tensor]:
        """The inputs, with copies of the donated ones whose memory somebody else holds. Warns about these once.

        `copies`: positions of inputs that are copies already. `borrows`: of leaves that are being read.
        `own_references`: see `OwnReferences`.
        """
        at = [i for i, slot in enumerate(self._slots) if slot not in copies]
        foreign = {
            i for i in at if self._is_foreign(inputs[self._slots[i]], i) or own_references(self._slots[i]) is None
        }
        candidates = [i for i in at if i not in foreign]
        held = self._held(inputs, candidates, borrows, own_references)
        if held and empty_all_on(set(storage_ids([inputs[self._slots[i]] for i in held]))):
            self.old_are_kept = True
            held = self._held(inputs, held, borrows, own_references)
        if held and not self._warned:
            self._warned = True
            self._warn([self._slots[i] for i in held], inputs)
        if not foreign and not held:
            if len(at) == len(self._slots) and not [*borrows]:
                self._learn(inputs, own_references)
            return inputs
        copied = {self._slots[i] for i in (*foreign, *held)}
        return [x.clone() if slot in copied else x for slot, x in enumerate(inputs)]

    def _is_foreign(self, x: Tensor, i: int) -> bool:
        """True for memory whose holders torch may not count: memory that it did not allocate, or that of a larger
        tensor.
        """
        if self._known and storage_id(x) == self._known[i]:
            return False
        return not x.untyped_storage().resizable() or x._base is not None

    def _held(
        self, inputs: Sequence[Tensor], at: Sequence[int], borrows: Iterable[Borrow], own_references: OwnReferences
    ) -> list[int]:
        tensors = [inputs[self._slots[i]] for i in at]
        with ExitStack() as stack:
            read = [storage_id(x) for borrow in set(borrows) for x in stack.enter_context(borrow.held_open())]
            found = references(tensors)[1]
        expected = self._expected_of(inputs, at, own_references)
        by_borrows = dict.fromkeys(read, 0)
        for memory in read:
            by_borrows[memory] += 1
        return [
            i
            for i, x, here, alone in zip(
                at, tensors, zip(*found, strict=True), zip(*expected, strict=True), strict=True
            )
            if (here[0] - by_borrows.get(storage_id(x), 0), *here[1:]) != alone
        ]

    def _expected_of(self, inputs: Sequence[Tensor], at: Sequence[int], own_references: OwnReferences) -> References:
        """The reference counts if nobody else holds the inputs."""
        memory, objects, handles = self._alone
        return References(
            [memory[i] + self._ours(inputs, self._slots[i], own_references) for i in at],
            [objects[i] for i in at],
            [handles[i] for i in at],
        )

    def _ours(self, inputs: Sequence[Tensor], slot: int, own_references: OwnReferences) -> int:
        """How many further references of the trainer's own there are to the memory of an input."""
        kept = self._arguments is not None and self._arguments.holds(slot, inputs[slot])
        return int(kept) + (own_references(slot) or 0)

    def _learn(self, inputs: Sequence[Tensor], own_references: OwnReferences) -> None:
        tensors = [inputs[slot] for slot in self._slots]
        self._anchors = [*map(weak_reference, tensors)]
        self._known = storage_ids(tensors)
        self._expected = self._expected_of(inputs, range(len(tensors)), own_references)
        self._changes = self._changes_now()

    def _changes_now(self) -> int:
        return 0 if self._arguments is None else self._arguments.changes

    def _warn(self, slots: Sequence[int], inputs: Sequence[Tensor]) -> None:
        names = ", ".join(repr(self._paths[slot]) for slot in slots[:4])
        more = f" and {len(slots) - 4} more" if len(slots) > 4 else ""
        size = show_bytes(sum(inputs[slot].nbytes for slot in slots))
        warnings.warn(
            f"something else than the state holds the memory of {names}{more} (a view, what detach() or numpy() gave, "
            f"a parameter of a module), and {self._name} writes its new state over it: that memory is left unchanged, "
            f"at the cost of a copy of {size}. Release it before the call, or keep a clone(); later copies are not "
            "reported",
            stacklevel=2,
        )
