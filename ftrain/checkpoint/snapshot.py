"""Copies of a state in spare memory, so that a save can be written while the next steps change the state."""

import torch
from torch import Tensor

from ftrain.checkpoint.leaves import Leaves


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
            self._buffer(path, tensor).zero_()

    def copy(self, leaves: Leaves) -> Leaves:
        """Copy all tensors; when this returns, the state may change. The copies are valid until the next call."""
        self._buffers = {path: buffer for path, buffer in self._buffers.items() if path in leaves.tensors}
        copies = {}
        for path, tensor in leaves.tensors.items():
            copies[path] = self._buffer(path, tensor).copy_(tensor, non_blocking=True)
        for device in {t.device for t in leaves.tensors.values() if t.device.type == "cuda"}:
            torch.cuda.synchronize(device)
        return Leaves(copies, dict(leaves.scalars), dict(leaves.divisions))

    def _buffer(self, path: str, tensor: Tensor) -> Tensor:
        old = self._buffers.get(path)
        if old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype:
            return old
        new = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        self._buffers[path] = new
        return new
