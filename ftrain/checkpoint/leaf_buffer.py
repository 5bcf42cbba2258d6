"""Memory for the leaves that are restored: of their own, or the donated old leaf's."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ftrain.graph.torch_private import FakeTensor


class LeafBuffer:
    """Where one leaf is read into: first memory of the host, then where it belongs."""

    def __init__(self, leaf: Any, part: Tensor, *, donate: bool) -> None:
        """`leaf`: of the abstract state; `part`: what this process holds of it, or a meta tensor of that shape."""
        self._leaf, self._part = leaf, part
        real = part.device.type != "meta" and not isinstance(part, FakeTensor)
        # The part of a padded piece is a view with gaps, yet no two of its elements share memory; of a plain tensor
        # that is not contiguous nobody knows.
        self._donated = donate and real and (part.is_contiguous() or isinstance(leaf, DTensor))
        self._host: Tensor | None = None
        self._found: Tensor | None = None

    def host(self) -> Tensor:
        """Contiguous CPU memory, to be filled."""
        part = self._part
        if self._donated and part.device.type == "cpu" and part.is_contiguous():
            self._host = part
        else:
            self._host = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.device.type == "cuda")
        return self._host

    def filled(self) -> None:
        """The host memory holds the values: bring them where they belong, and let go of it."""
        assert self._host is not None
        if not self._donated:
            device = self._part.device
            self._found = self._host if device.type == "meta" else self._host.to(device)
        elif self._host is not self._part:
            self._part.copy_(self._host)
        self._host = None

    def leaf(self) -> Tensor:
        """The restored leaf."""
        if self._donated:
            return self._leaf
        assert self._found is not None
        like = self._leaf
        if isinstance(like, DTensor):
            return DTensor.from_local(
                self._found, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
            )
        return self._found
