"""Where a recorded program finds its arguments: it works on fixed addresses, and a call's tensors may be anywhere.

What stays at its address (a donated state, frozen weights) is used where it is. What moves (a batch) is copied into
memory of the program's own before a run, and back after it if the program writes over it. What lies on another device,
the host, is part of the record: its *value* must be the recorded one.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ftrain.graph.torch_private import storage_id

_STANDS = 3
"""An argument that stood at an address for so many calls is expected to stand at its next one."""


class ArgumentMemory:
    """The memory of a program's arguments, by their positions.

    Memory that is used in place is kept alive: no other tensor can come to lie at its address, and tensors of the
    caller are never written over but by the program itself.
    """

    def __init__(self, written: Collection[int], *, device_type: str = "cuda") -> None:
        """`written`: the arguments that the program writes over; `device_type`: where the recorded work is done."""
        self._written, self._device_type = frozenset(written), device_type
        self._calls = 0
        self.changes = 0
        """How often it may have changed which memory is kept alive."""
        self._held: list[Tensor] = []
        self._since: list[int] = []
        self._own: set[int] = set()
        self._in_place: list[int] = []
        self._addresses: list[int] = []
        self._values: list[int] = []

    def holds(self, slot: int, x: Tensor) -> bool:
        """True if `x` lies in the memory of an argument that is kept alive here."""
        return bool(self._held) and self._held[slot] is not x and storage_id(self._held[slot]) == storage_id(x)

    def watch(self, inputs: Sequence[Tensor]) -> None:
        """Note where the arguments of a call lie that is not a replay; before the program runs."""
        if not self._held:
            self.changes += 1
            self._held = [x.detach() for x in inputs]
            self._since = [-_STANDS] * len(inputs)
        for slot, x in enumerate(inputs):
            if x.data_ptr() != self._held[slot].data_ptr():
                self.changes += 1
                self._held[slot] = x.detach()
                if slot not in self._written:  # what is written comes back at the same address: it is a state
                    self._since[slot] = self._calls
        self._calls += 1

    def settle(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The tensors to record the program with, from this call on; those of an earlier record are let go."""
        self.changes += 1
        for slot, x in enumerate(inputs):
            if x.device.type != self._device_type:
                self._held[slot] = x.clone()
            elif slot not in self._own and x.data_ptr() != self._held[slot].data_ptr():
                self._move(slot, x)
        on_device = [i for i, x in enumerate(inputs) if x.device.type == self._device_type]
        self._values = [i for i, x in enumerate(inputs) if x.device.type != self._device_type]
        self._in_place = [i for i in on_device if i not in self._own]
        self._addresses = [self._held[i].data_ptr() for i in self._in_place]
        return list(self._held)

    def _move(self, slot: int, x: Tensor) -> None:
        """Use an argument where it is now, or in memory of its own if it did not stand long where it was."""
        if self._calls - self._since[slot] >= _STANDS:
            self._held[slot] = x.detach()
        else:
            self._held[slot] = torch.empty_like(x)
            self._own.add(slot)
        self._since[slot] = self._calls

    def moved(self, inputs: Sequence[Tensor]) -> list[int]:
        """The arguments for which the record is not right any more: in another place, or another value of the host."""
        if [inputs[i].data_ptr() for i in self._in_place] == self._addresses:
            away = []
        else:
            away = [i for i, a in zip(self._in_place, self._addresses, strict=True) if inputs[i].data_ptr() != a]
        return away + [i for i in self._values if not _same_bits(inputs[i], self._held[i])]

    def load(self, inputs: Sequence[Tensor]) -> None:
        """Bring a call's arguments to where the program reads them; before each replay."""
        self._calls += 1
        for slot in self._own:
            self._held[slot].copy_(inputs[slot])

    def store(self, inputs: Sequence[Tensor]) -> None:
        """Bring what the program has written to the caller's memory; after each replay."""
        for slot in self._own & self._written:
            inputs[slot].copy_(self._held[slot])


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
