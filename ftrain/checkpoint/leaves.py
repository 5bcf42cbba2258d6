"""A state as named leaves: which are tensors to store as arrays, which are values for the manifest."""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ftrain import tree
from ftrain.checkpoint.folders import KEY_BYTES, storage_key
from ftrain.checkpoint.manifest import INTEGERS, Scalar
from ftrain.checkpoint.shard_layout import ShardLayout, ShardLayouts, Window

_SCALARS = (bool, int, float, str)


@dataclasses.dataclass(frozen=True)
class Leaves:
    """The leaves of one state by path, in the order of the tree.

    `tensors` are what this process holds; of those in `divisions` that is a part of an array spread over ranks, the
    others are whole (and in a run of several processes equal on all of them).
    """

    tensors: dict[str, Tensor]
    scalars: dict[str, Scalar]
    layouts: dict[str, ShardLayout] = dataclasses.field(default_factory=dict)


@torch.no_grad()
def named_leaves(state: Any) -> Leaves:
    """Split a state into tensors and plain values (bool, int, float, str).

    Raises:
        ValueError: a leaf is of another type, is an integer beyond int64, is not dense, or has the name of another one.
    """
    values, _ = tree.flatten(state)
    paths = tree.paths(state)
    require_names(paths)
    found, layouts = Leaves({}, {}), ShardLayouts()
    for path, value in zip(paths, values, strict=True):
        if isinstance(value, DTensor):
            local = value.to_local()
            found.layouts[path] = layouts.of(value, local, path)
            found.tensors[path] = _dense(path, local)
        elif isinstance(value, Window):
            found.layouts[path] = ShardLayout(value.shape, value.box, {})
            found.tensors[path] = torch.empty([n for _, n in value.box], dtype=value.dtype, device="meta")
        elif isinstance(value, Tensor):
            found.tensors[path] = _dense(path, value)
        elif type(value) is int and value not in INTEGERS:
            raise ValueError(
                f"{path!r} is an integer beyond int64, and a checkpoint holds none of these: make it a str"
            )
        elif type(value) in _SCALARS:
            found.scalars[path] = value
        else:
            raise ValueError(
                f"{path!r} is a {type(value).__name__}: a checkpoint holds tensors, bool, int, float and str; "
                "make it one of these, or a static field of its struct"
            )
    return found


def require_names(paths: Iterable[str], *, longest: int = KEY_BYTES) -> None:
    """ValueError if a leaf has the name of another one, or one that cannot be stored in `longest` bytes."""
    counts = Counter(iter(paths))  # of a mapping it would take the values for counts
    for path in counts:
        try:
            size = len(storage_key(path))
        except UnicodeEncodeError:
            raise ValueError(f"the leaf {_short(path)} has a name that is not UTF-8: rename its keys") from None
        if size > longest:
            raise ValueError(
                f"the leaf {_short(path)} has a name of {size} bytes as it is stored, and may have {longest}: shorten "
                "its keys"
            )
    twice = [path for path, count in counts.items() if count > 1]
    if twice:
        raise ValueError(
            f"two leaves have the name {twice[0]!r}: rename a key that holds a dot, or looks like an index"
        )


def _short(path: str) -> str:
    shown = ascii(path)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _dense(path: str, tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise ValueError(f"{path!r} is {tensor.layout}: a checkpoint holds dense tensors, call .to_dense() first")
    return tensor.detach()
