"""Where a recorded program finds its arguments: it works on fixed addresses, and a call's tensors may be anywhere.

An argument that stays at its address (a donated state, frozen weights) is used in place. One that moves (a batch) is
copied into memory of the program before a run, and back after it if the program writes over it. An argument on another
device, such as the host, is part of the record: its *value* must be the recorded one.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ftrain.graph.torch_memory import storage_id

_STAYS = 3
"""An argument that stayed at an address for so many calls is expected to stay at its next one."""


class ArgumentMemory:
    """The memory of a program's arguments, by their positions.

    Memory that is used in place is kept alive, so that no other tensor can take its address. Only the program itself
    writes over tensors of the caller.
    """

    def __init__(self, written: Collection[int], *, device_type: str = "cuda") -> None:
        """`written`: positions of the arguments that the program writes over. `device_type`: of the device that is
        recorded.
        """
        self._written, self._device_type = frozenset(written), device_type
        self._calls = 0
        self.changes = 0
        """A counter that grows whenever the memory that is kept alive may have changed."""
        self._held: list[Tensor] = []
        self._since: list[int] = []
        self._own: set[int] = set()
        self._in_place: list[int] = []
        self._addresses: list[int] = []
        self._values: list[int] = []

    def holds(self, slot: int, x: Tensor) -> bool:
        """True if `x`, of any shape, lies in the memory of argument `slot` that is kept alive here."""
        return bool(self._held) and self._held[slot] is not x and storage_id(self._held[slot]) == storage_id(x)

    def watch(self, inputs: Sequence[Tensor]) -> None:
        """Note the addresses of the arguments of a call that is not a replay, before the program runs."""
        if not self._held:
            self.changes += 1
            self._held = [x.detach() for x in inputs]
            self._since = [-_STAYS] * len(inputs)
        for slot, x in enumerate(inputs):
            if x.data_ptr() != self._held[slot].data_ptr():
                self.changes += 1
                self._held[slot] = x.detach()
                if slot not in self._written:  # a state comes back at the same address
                    self._since[slot] = self._calls
        self._calls += 1

    def settle(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Choose the tensors to record the program with, from this call on. Those of an earlier record are released."""
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
        """Use an argument at its new address, or in memory of its own if it did not stay long at the old one."""
        if self._calls - self._since[slot] >= _STAYS:
            self._held[slot] = x.detach()
        else:
            self._held[slot] = torch.empty_like(x)
            self._own.add(slot)
        self._since[slot] = self._calls

    def moved(self, inputs: Sequence[Tensor]) -> list[int]:
        """Positions of the arguments for which the record no longer holds: at another address, or with another value on
        the host.
        """
        if [inputs[i].data_ptr() for i in self._in_place] == self._addresses:
            away = []
        else:
            away = [i for i, a in zip(self._in_place, self._addresses, strict=True) if inputs[i].data_ptr() != a]
        return away + [i for i in self._values if not _same_bits(inputs[i], self._held[i])]

    def load(self, inputs: Sequence[Tensor]) -> None:
        """Copy a call's arguments to where the program reads them, before each replay."""
        self._calls += 1
        for slot in self._own:
            self._held[slot].copy_(inputs[slot])

    def store(self, inputs: Sequence[Tensor]) -> None:
        """Copy what the program has written to the caller's memory, after each replay."""
        for slot in self._own & self._written:
            inputs[slot].copy_(self._held[slot])


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
