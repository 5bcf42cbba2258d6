"""A mesh of processes: its groups under names that are the same on every rank, and pieces as DTensors."""

import math
import os
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ftrain.sharding.joint_calls import joint_call
from ftrain.sharding.mesh import BASE_AXES, EXPERT_AXES, Mesh, legal_sizes
from ftrain.sharding.placement import Placement
from ftrain.sharding.private import group_timeout, has_group, make_dtensor, register_group

T = TypeVar("T")
PIECE = "padded_piece"
"""The attribute of a DTensor that `to_dtensor` made in which its padded piece is."""


def require_world(mesh: Mesh) -> int:
    """This process's rank. ValueError if torch.distributed does not run as many ranks as the mesh has."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world != mesh.size:
        found = f"the mesh ({mesh}) has {mesh.size} ranks and there are {world} processes{_why_alone()}"
        raise ValueError(f"{found}; {legal_sizes(world)}")
    return dist.get_rank() if dist.is_initialized() else 0


def _why_alone() -> str:
    """What is missing where torch.distributed was not initialised."""
    if dist.is_initialized():
        return ""
    started = os.environ.get("WORLD_SIZE")
    if started is not None:
        return (
            f": torchrun started {started}, but torch.distributed is not initialised; call "
            "torch.distributed.init_process_group() first (ftrain.run.session does)"
        )
    return ": run under torchrun, or take Mesh(..., kind='virtual') for all ranks in this one process"


def same_everywhere(value: T, mesh: Mesh | None) -> T:
    """What rank 0 of a mesh of processes has, on all ranks; `value` itself on any other mesh.

    Nothing measured may differ between the ranks' graphs. `value` is pickled.
    """
    if mesh is None or mesh.kind != "process" or not dist.is_initialized():
        return value
    joint_call("planned a step for new arguments")
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def open_groups(mesh: Mesh, axes: Iterable[tuple[str, ...]]) -> None:
    """Make and name the process groups over each of `axes`; all ranks call this with the same ones, in one order.

    ValueError if torch.distributed does not run as many ranks as the mesh has.
    """
    require_world(mesh)
    for names in axes:
        group = mesh.group(*names)
        if not has_group(group.name):
            joint_call("opened the groups of a step")
            members = [list(m) for m in mesh.members(*names)]
            mine, _ = dist.new_subgroups_by_enumeration(members, timeout=group_timeout())
            register_group(group.name, mine)


class DeviceMeshes:
    """The DeviceMeshes on which the pieces of a mesh's arrays are described, made when first needed."""

    def __init__(self, mesh: Mesh, device_type: str) -> None:
        self._mesh, self._device_type = mesh, device_type
        self._made: dict[tuple[tuple[str, ...], ...], DeviceMesh] = {}

    def describe(self, placement: Placement) -> tuple[DeviceMesh, list[Any]]:
        """The DeviceMesh and the list of DTensor placements of an array placed as `placement` says.

        A mesh is made at the first call for it, in which all ranks take part: they call this in one order.
        """
        base = EXPERT_AXES if any(a.startswith("expert") for s in placement.splits for a in s.axes) else BASE_AXES
        split = {a for s in placement.splits for a in s.axes}
        dims = [(a,) for a in base if a not in split] + [s.axes for s in placement.splits]
        mesh = self._made.get(tuple(dims))
        if mesh is None:
            mesh = self._made[tuple(dims)] = self._make(dims)
        return mesh, [Replicate() for a in base if a not in split] + [Shard(s.dim) for s in placement.splits]

    def _make(self, dims: list[tuple[str, ...]]) -> DeviceMesh:
        joint_call("divided arrays in a new way (step.init, step.shard or a restore)")
        sizes = [math.prod(self._mesh.axis_size(a) for a in axes) for axes in dims]
        ranks = torch.empty(sizes, dtype=torch.int64)
        for rank in range(self._mesh.size):
            ranks[tuple(self._place(rank, axes) for axes in dims)] = rank
        return DeviceMesh(self._device_type, ranks, mesh_dim_names=tuple("+".join(axes) for axes in dims))

    def _place(self, rank: int, axes: tuple[str, ...]) -> int:
        index = 0
        for axis in axes:
            index = index * self._mesh.axis_size(axis) + self._mesh.coordinate(rank, axis)
        return index


def to_dtensor(piece: Tensor, placement: Placement, mesh: Mesh, rank: int, meshes: DeviceMeshes) -> Tensor:
    """The DTensor of which `piece` (of the placement's `local_shape`, padded) is the part of `rank`.

    `meshes`: the DeviceMeshes of `mesh`, made once. The DTensor holds the piece without its padding, and the padded
    memory behind it. An array without splits stays a plain tensor.
    """
    if not placement.splits:
        return piece
    local = piece.detach()  # a tensor of its own: `to_local` may hand it out, and then it is donated
    for dim, (_, length) in enumerate(placement.windows(mesh, rank)):
        local = local.narrow(dim, 0, length)
    device_mesh, placements = meshes.describe(placement)
    array = make_dtensor(local, device_mesh, placements, placement.shape)
    array.__dict__[PIECE] = piece
    return array


def to_piece(leaf: Tensor, placement: Placement) -> Tensor:
    """This rank's piece, padded to the placement's `local_shape`: the memory behind a DTensor that `to_dtensor` made,
    or a padded copy of another's. A plain tensor is returned as it is.

    ValueError for a DTensor of another mesh, whose pieces have other shapes.
    """
    if not isinstance(leaf, DTensor):
        return leaf
    piece = leaf.__dict__.get(PIECE)
    if piece is not None and tuple(piece.shape) == placement.local_shape:
        return piece
    local = leaf.to_local().detach()
    if any(n > most for n, most in zip(local.shape, placement.local_shape, strict=True)):
        raise ValueError(
            f"an array of shape {tuple(leaf.shape)} is divided as {leaf.placements} over {leaf.device_mesh}, not "
            f"as this mesh divides it ({placement.splits}): it comes from another mesh; restore the state from its "
            "checkpoint on this one, or divide the whole one (step.shard(other_step.whole(state)))"
        )
    if tuple(local.shape) == placement.local_shape:
        return local.contiguous()
    padded = local.new_zeros(placement.local_shape)
    padded[tuple(slice(0, n) for n in local.shape)] = local
    return padded
