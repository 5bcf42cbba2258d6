"""Arrays on a mesh of processes: each process holds its piece, as a DTensor."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ftrain.sharding.mesh import Mesh
from ftrain.sharding.placement import Placement
from ftrain.sharding.processes import DeviceMeshes, require_world, to_dtensor
from ftrain.trace.spmd import Placements


class ProcessArrays:
    """The arrays of a state on a mesh; of other meshes than those of processes they are whole."""

    def __init__(self, mesh: Mesh, placements: Placements) -> None:
        self._mesh, self._placements = mesh, placements
        self._device_meshes: dict[str, DeviceMeshes] = {}

    def shard(self, paths: Sequence[str], leaves: Sequence[Any]) -> list[Any]:
        """What this process holds of whole leaves that are equal on all processes; on other meshes the leaves."""
        if self._mesh.kind != "process":
            return list(leaves)
        rank = require_world(self._mesh)
        found = []
        for leaf, placement in zip(leaves, self._divided(paths, leaves), strict=True):
            piece = leaf if placement is None else placement.shard(leaf, self._mesh, rank)
            found.append(leaf if placement is None else self.wrap(piece, placement))
        return found

    def abstract(self, paths: Sequence[str], leaves: Sequence[Any], device_type: str) -> list[Any]:
        """As `shard`, of whole leaves that are shapes alone: DTensors around meta tensors, unpadded."""
        if self._mesh.kind != "process":
            return list(leaves)
        found = []
        for leaf, placement in zip(leaves, self._divided(paths, leaves), strict=True):
            if placement is None:
                found.append(leaf)
            else:
                piece = torch.empty(placement.local_shape, dtype=leaf.dtype, device="meta")
                found.append(self.wrap(piece, placement, device_type=device_type))
        return found

    def wrap(self, piece: Tensor, placement: Placement, *, device_type: str | None = None) -> Tensor:
        """The DTensor of which `piece` (padded) is this process's part, described as one on `device_type` (default:
        the piece's); an array that is not divided stays a plain tensor.
        """
        device_type = device_type or piece.device.type
        if device_type not in self._device_meshes:
            self._device_meshes[device_type] = DeviceMeshes(self._mesh, device_type)
        return to_dtensor(piece, placement, self._mesh, require_world(self._mesh), self._device_meshes[device_type])

    def _divided(self, paths: Sequence[str], leaves: Sequence[Any]) -> list[Placement | None]:
        """Where each leaf's pieces are; None for what is no tensor, or is not divided."""
        found = (
            self._placements.of_whole(path, tuple(leaf.shape)) if isinstance(leaf, Tensor) else None
            for path, leaf in zip(paths, leaves, strict=True)
        )
        return [placement if placement is not None and placement.splits else None for placement in found]
