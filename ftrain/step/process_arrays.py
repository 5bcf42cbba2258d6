"""Arrays on a mesh of processes: each process holds its piece as a DTensor."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ftrain.sharding.mesh import Mesh
from ftrain.sharding.placement import Placement
from ftrain.sharding.processes import DeviceMeshes, require_world, to_dtensor
from ftrain.trace.spmd import Placements


class ProcessArrays:
    """Converts between whole leaves and the pieces of this process. On meshes of another kind all leaves are whole."""

    def __init__(self, mesh: Mesh, placements: Placements) -> None:
        self._mesh, self._placements = mesh, placements
        self._device_meshes: dict[str, DeviceMeshes] = {}

    def shard(self, paths: Sequence[str], leaves: Sequence[Any]) -> list[Any]:
        """The pieces that this process holds of whole leaves that are equal on all processes; on other meshes the
        leaves.

        `paths`: of the leaves, by which their placements are found. RuntimeError where the mesh does not have as many
        ranks as the run has processes.
        """
        if self._mesh.kind != "process":
            return list(leaves)
        rank = require_world(self._mesh)
        found = []
        for leaf, placement in zip(leaves, self._divided(paths, leaves), strict=True):
            piece = leaf if placement is None else placement.shard(leaf, self._mesh, rank)
            found.append(leaf if placement is None else self.wrap(piece, placement))
        return found

    def abstract(self, paths: Sequence[str], leaves: Sequence[Any], device_type: str) -> list[Any]:
        """As `shard`, for whole leaves that are shapes alone: DTensors around unpadded meta tensors, described as on
        `device_type`.
        """
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
        """The DTensor of an array, from this process's piece of it (its shape is the placement's `local_shape`, padding
        included).

        `device_type`: of the device mesh of the DTensor; default: the piece's. An array that is not divided stays a
        plain tensor.
        """
        device_type = device_type or piece.device.type
        if device_type not in self._device_meshes:
            self._device_meshes[device_type] = DeviceMeshes(self._mesh, device_type)
        return to_dtensor(piece, placement, self._mesh, require_world(self._mesh), self._device_meshes[device_type])

    def _divided(self, paths: Sequence[str], leaves: Sequence[Any]) -> list[Placement | None]:
        """The placement of each leaf; None for constants and for leaves that are not divided."""
        found = (
            self._placements.of_global(path, tuple(leaf.shape)) if isinstance(leaf, Tensor) else None
            for path, leaf in zip(paths, leaves, strict=True)
        )
        return [placement if placement is not None and placement.splits else None for placement in found]
