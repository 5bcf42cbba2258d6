"""Which arguments a trace is for, checked at every call: with a full comparison once, later by one guard in C++."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ftrain.graph.layouts import lies_plainly
from ftrain.step.leaf_guard import guard_like
from ftrain.trace.tracer import Aval, is_array

# C functions, since every call pays for each leaf.
_PLAIN = {Tensor, torch.nn.Parameter}
_dtype_of = operator.attrgetter("dtype")
_device_of = operator.attrgetter("device")


class Signature:
    """The structure, shapes, dtypes, devices and constants of the arguments of a trace, and the modes around the call.

    `paths` and `leaves`: of the arguments as they were traced; `avals`: of those that are tensors; `around`: see
    `TraceCache.around`.
    """

    def __init__(
        self, treedef: Any, paths: Sequence[str], leaves: Sequence[Any], avals: Sequence[Aval], around: tuple[Any, ...]
    ) -> None:
        self.paths, self.around = list(paths), around
        self.slots = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
        """Positions of the leaves that are tensors."""
        self.treedef = treedef
        self._shapes = [torch.Size(a.shape) for a in avals]
        self._dtypes = [a.dtype for a in avals]
        self._devices = [a.device for a in avals]
        self._statics = [(i, leaf) for i, leaf in enumerate(leaves) if not is_array(leaf)]
        self._guard: Callable[..., bool] | None = None

    def matches(self, leaves: list[Any], treedef: Any, around: tuple[Any, ...] | None) -> bool:
        """True if arguments with these `leaves` and this structure (`treedef`) can run as they are, in a call with the
        surroundings `around` (see `TraceCache.around`).
        """
        if treedef != self.treedef or around != self.around or not self._same_statics(leaves):
            return False
        leaves = self.tensors(leaves)
        return (
            set(map(type, leaves)) <= _PLAIN
            and [*map(Tensor.size, leaves)] == self._shapes
            and [*map(_dtype_of, leaves)] == self._dtypes
            and [*map(_device_of, leaves)] == self._devices
        )

    def matches_fast(self, leaves: list[Any], treedef: Any, around: tuple[Any, ...] | None) -> bool:
        """True if arguments like these were learned before: they match, and all tensors lie plainly. Arguments as
        for `matches`.
        """
        if self._guard is None or around != self.around or treedef != self.treedef or not self._same_statics(leaves):
            return False
        return self._guard(*self.tensors(leaves))

    def learn(self, tensors: Sequence[Tensor]) -> None:
        """Accept arguments like these by `matches_fast` from now on, if all tensors, of any shapes, lie plainly."""
        self._guard = guard_like(tensors) if all(map(lies_plainly, tensors)) else None

    def tensors(self, leaves: list[Any]) -> list[Any]:
        """The leaves that are tensors."""
        return [leaves[i] for i in self.slots] if self._statics else leaves

    def _same_statics(self, leaves: list[Any]) -> bool:
        return all(
            type(leaves[i]) is type(v) and leaves[i] == v and (v != 0 or str(leaves[i]) == str(v))  # -0.0 is not 0.0
            for i, v in self._statics
        )
