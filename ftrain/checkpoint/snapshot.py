"""Copies of a state in spare memory, so that a save can be written while the next steps change the state.

The copy itself goes on behind the next step too: the leaves are borrowed (see `ftrain.runtime.borrow`) until they are
copied. A `fork` would snapshot without a copy, but its child may not use the threads that tensorstore and OpenMP had in
the parent, every page that the step then writes costs a fault and a copy, and CUDA memory is not part of it.
"""

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ftrain.checkpoint.leaves import Leaves
from ftrain.graph.torch_memory import version_of
from ftrain.runtime.borrow import Borrow, borrowable


class Spare:
    """Buffers on the host for one state, made at the first copy and used again by every later one.

    They take as many bytes as the state's tensors (pinned for those on a CUDA device). A leaf that changes its shape or
    dtype gets a new buffer; one that is gone gives its buffer back.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def reserve(self, leaves: Leaves) -> None:
        """Make the buffers and touch their memory, which costs far more than a copy into it."""
        for path, tensor in leaves.tensors.items():
            self.buffer(path, tensor).zero_()

    def borrow(self, leaves: Leaves, state: Mapping[str, Any]) -> "Snapshot":
        """Borrow the leaves of a state, given as `leaves` and as the objects that its owner has; what cannot be
        borrowed is cloned. The caller must run `Snapshot.take` or end the borrow.
        """
        self._buffers = {path: buffer for path, buffer in self._buffers.items() if path in leaves.tensors}
        return Snapshot(self, leaves, {path: leaf for path, leaf in state.items() if borrowable(leaf)})

    def buffer(self, path: str, tensor: Tensor) -> Tensor:
        """The spare memory of a leaf, of the shape and dtype of `tensor`."""
        old = self._buffers.get(path)
        if old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype:
            return old
        new = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        self._buffers[path] = new
        return new


class Snapshot:
    """A copy that is under way, for as long as the `borrow`."""

    def __init__(self, spare: Spare, leaves: Leaves, borrowed: Mapping[str, Tensor]) -> None:
        """Borrow the leaves whose objects are `borrowed`; clone the others, which are small."""
        sources = {path: t if path in borrowed else t.clone() for path, t in leaves.tensors.items()}
        self._spare, self._leaves = spare, Leaves(sources, dict(leaves.scalars), dict(leaves.layouts))
        self._versions = {path: version_of(sources[path]) for path in borrowed}
        devices = {tensor.device for tensor in sources.values()}
        self._written = {d: torch.cuda.current_stream(d).record_event() for d in devices if d.type == "cuda"}
        self.borrow = Borrow(borrowed.values(), sources)

    def take(self) -> Leaves:
        """Copy all leaves and end the borrow; for another thread. The copies are valid until the next `Spare.borrow`.

        Raises:
            ValueError: a leaf was written to meanwhile, through another tensor on its memory; it is named.
        """
        leaves, sources = self._leaves, dict(self._leaves.tensors)  # the borrow may be ended by somebody else
        try:
            copies = self._copied(sources)
            for path, version in self._versions.items():
                if version_of(sources[path]) != version:
                    raise ValueError(
                        f"{path!r} was written to while it was copied, through a view of it that was made before the "
                        "save: write to the leaf itself, or wait for the save first"
                    )
        finally:
            sources.clear()
            self.borrow.end()
            self._leaves = Leaves({}, {})  # the state's memory belongs to its owner again
        return Leaves(copies, leaves.scalars, leaves.layouts)

    def _copied(self, sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies = {path: self._spare.buffer(path, tensor) for path, tensor in sources.items()}
        for device, written in self._written.items():
            stream = torch.cuda.Stream(device)
            stream.wait_event(written)
            with torch.cuda.stream(stream):
                for path, tensor in sources.items():
                    if tensor.device == device:
                        copies[path].copy_(tensor, non_blocking=True)
            stream.synchronize()
        for path, tensor in sources.items():
            if tensor.device.type != "cuda":
                _copy_on_host(copies[path], tensor)
        return copies


def _copy_on_host(target: Tensor, source: Tensor) -> None:
    """One thread copies, so that the other cores stay with the step; it makes no tensor on the source's memory."""
    if source.device.type == "cpu" and source.is_contiguous() and not (source.is_conj() or source.is_neg()):
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
    else:
        target.copy_(source)
