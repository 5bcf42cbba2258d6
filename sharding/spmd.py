"""The context of a trace for many ranks: which mesh, where this rank stands, and what a collective is for.

A graph serves all ranks, so a rank's coordinates are never constants of it: they are read from an input, an int64
tensor `[3]` of this rank's places on the axes replicate, shard, sequence.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from ftrain.sharding.mesh import BASE_AXES, Mesh


@dataclass(frozen=True)
class Spmd:
    """The mesh of the trace under way, and the input that holds the rank's coordinates (int64 `[3]`, on the CPU)."""

    mesh: Mesh
    coordinates_3: Tensor


_current: ContextVar[Spmd | None] = ContextVar("ftrain_spmd", default=None)
_purpose: ContextVar[str] = ContextVar("ftrain_purpose", default="")
_filled: ContextVar[float] = ContextVar("ftrain_filled", default=1.0)


@contextmanager
def on_mesh(mesh: Mesh, coordinates_3: Tensor) -> Iterator[None]:
    """Within the block `axis_index` reads these coordinates (int64 `[3]`, on the CPU)."""
    token = _current.set(Spmd(mesh, coordinates_3))
    try:
        yield
    finally:
        _current.reset(token)


def coordinates(mesh: Mesh, rank: int) -> Tensor:
    """The coordinates of a rank as a graph takes them: int64 `[3]`, its positions on replicate, shard and sequence.

    >>> from ftrain.sharding import Mesh
    >>> from ftrain.sharding.spmd import coordinates
    >>> coordinates(Mesh(shard=2, sequence=2), 3)
    tensor([0, 1, 1])
    """
    return torch.tensor([mesh.coordinate(rank, axis) for axis in BASE_AXES], dtype=torch.int64)


def axis_index(axis: str) -> Tensor:
    """This rank's position on an axis, a 0-d int64 tensor on the CPU; 0 outside of a trace for a mesh.

    `axis`: as in `Mesh.axis_size`, or "data" (replicate x shard), "world", "shard+sequence".
    """
    spmd = _current.get()
    if spmd is None:
        return torch.zeros((), dtype=torch.int64)
    mesh, at = spmd.mesh, spmd.coordinates_3
    if axis in BASE_AXES:
        return at[BASE_AXES.index(axis)]
    if axis == "shard+sequence":
        return at[1] * mesh.sequence + at[2]
    if axis == "expert":
        return (at[1] * mesh.sequence + at[2]) % mesh.expert
    if axis == "expert_shard":
        return (at[1] * mesh.sequence + at[2]) // mesh.expert
    if axis == "data":
        return at[0] * mesh.shard + at[1]
    if axis == "world":
        return (at[0] * mesh.shard + at[1]) * mesh.sequence + at[2]
    mesh.axis_size(axis)
    inner = int(axis.split(":")[1])
    return at[2] % inner if axis.startswith("ulysses") else at[2] // inner


@contextmanager
def purpose(name: str) -> Iterator[None]:
    """Collectives made within the block serve `name` (fsdp_gather, ulysses, expert_dispatch, ...), as tables then
    show.
    """
    token = _purpose.set(name)
    try:
        yield
    finally:
        _purpose.reset(token)


def current_purpose() -> str:
    """What the collectives that are being made are for; empty where no `purpose` is set."""
    return _purpose.get()


@contextmanager
def filled(share: float) -> Iterator[None]:
    """Ops made within the block work on batches of which this `share` (0 to 1) is not padding.

    The search of layouts asks for it: from a few layers it extrapolates to many, which fill the batches.
    """
    token = _filled.set(share)
    try:
        yield
    finally:
        _filled.reset(token)


def current_filled() -> float:
    """The share of what is being worked on that is not padding, 0 to 1."""
    return _filled.get()
