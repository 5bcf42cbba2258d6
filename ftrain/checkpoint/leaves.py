"""A state as named leaves: which are tensors to store as arrays, which are values for the manifest."""

import dataclasses
import urllib.parse
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from ftrain import tree
from ftrain.checkpoint.chunks import chunk_shape
from ftrain.checkpoint.dtypes import dtype_name
from ftrain.checkpoint.folders import part_of
from ftrain.checkpoint.manifest import ArrayLeaf, Scalar

_SCALARS = (bool, int, float, str)


@dataclasses.dataclass(frozen=True)
class Leaves:
    """The leaves of one state by path, in the order of the tree."""

    tensors: dict[str, Tensor]
    scalars: dict[str, Scalar]


def named_leaves(state: Any) -> Leaves:
    """Split a state into tensors and plain values (bool, int, float, str).

    Raises:
        ValueError: a leaf is of another type, is spread over ranks, or has the name of another one.
    """
    values, _ = tree.flatten(state)
    paths = tree.paths(state)
    _require_unique(paths)
    found = Leaves({}, {})
    for path, value in zip(paths, values, strict=True):
        if isinstance(value, Tensor):
            found.tensors[path] = _whole(path, value)
        elif type(value) in _SCALARS:
            found.scalars[path] = value
        else:
            raise ValueError(
                f"{path!r} is a {type(value).__name__}: a checkpoint holds tensors, bool, int, float and str; "
                "make it one of these, or a static field of its struct"
            )
    return found


def array_leaf(path: str, tensor: Tensor, chunk_bytes: int) -> ArrayLeaf:
    """How a tensor will be stored."""
    shape = tuple(tensor.shape)
    return ArrayLeaf(
        part=part_of(path),
        key=storage_key(path),
        shape=shape,
        dtype=dtype_name(tensor.dtype, path),
        chunk=chunk_shape(shape, shape, itemsize=tensor.itemsize, limit=chunk_bytes),
    )


def storage_key(path: str) -> str:
    """A leaf's name as one path component: letters, digits and `._-~` as they are, the rest as %XX."""
    key = urllib.parse.quote(path, safe="")
    return key.replace(".", "%2E") if key.strip(".") == "" else key


def _require_unique(paths: list[str]) -> None:
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise ValueError(
            f"two leaves have the name {twice[0]!r}: rename a key that holds a dot, or looks like an index"
        )


def _whole(path: str, tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise ValueError(f"{path!r} is {tensor.layout}: a checkpoint holds dense tensors, call .to_dense() first")
    if hasattr(tensor, "placements"):
        raise ValueError(f"{path!r} is spread over ranks: gather it with .full_tensor() first")
    return tensor.detach()
