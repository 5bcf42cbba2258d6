"""Copies of one array that have become different: silent corruption, found by hashes that ranks compare.

    check_replicas(state)  # every n steps, on all ranks

On a virtual mesh all copies are compared after every call already, whole (see `ftrain.step.sharded`).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ftrain import tree
from ftrain.sharding.bits import hash_bits
from ftrain.sharding.joint_calls import joint_call


@dataclass(frozen=True)
class Difference:
    """A leaf whose copies differ: `odd`, the ranks that differ from the majority of `ranks`; all if there is none."""

    path: str
    ranks: tuple[int, ...]
    odd: tuple[int, ...]

    def __str__(self) -> str:
        copies = f"of {len(self.ranks)} copies (ranks {', '.join(map(str, self.ranks))})"
        if self.odd == self.ranks:
            return f"{self.path!r}: {copies} no majority is equal"
        if len(self.odd) == 1:
            return f"{self.path!r}: {copies} that of rank {self.odd[0]} differs from the others"
        return f"{self.path!r}: {copies} those of ranks {', '.join(map(str, self.odd))} differ from the others"


class ReplicasDiffer(RuntimeError):
    """Arrays that must be equal on several ranks are not. `differences`: leaf by leaf."""

    def __init__(self, differences: Sequence[Difference]) -> None:
        shown = [str(d) for d in differences[:8]]
        more = [f"... and {len(differences) - 8} more leaves"] if len(differences) > 8 else []
        super().__init__(
            "copies of the state differ between ranks: a device or the memory of a machine computes wrong, or a "
            "collective was cut short. Go on from a checkpoint, without that machine.\n  " + "\n  ".join(shown + more)
        )
        self.differences = tuple(differences)


def check_replicas(state: Any) -> None:
    """Compare by hash all arrays of which several ranks hold a copy; all ranks call this together, between two steps.

    A plain tensor must be equal on all ranks; of a DTensor those pieces that the same part of it went to. On one
    process nothing is compared.

    Raises:
        ReplicasDiffer: on every rank alike, with the paths of the leaves and the ranks that differ.

    >>> import torch
    >>> from ftrain.resilience.replicas import check_replicas
    >>> check_replicas({"w": torch.ones(3)})  # one process: there is nothing to compare
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    found = zip(tree.paths(state), tree.leaves(state), strict=True)
    copied = [(path, leaf, copies_of(leaf)) for path, leaf in found if isinstance(leaf, Tensor)]
    copied = [(path, leaf, groups) for path, leaf, groups in copied if groups]
    if not copied:
        return
    own = torch.stack([hash_bits(_held(leaf)) for _, leaf, _ in copied])
    joint_call("compared the copies of a state")
    hashes_RL = _gather(own)
    differences = compare([path for path, _, _ in copied], hashes_RL, [groups for _, _, groups in copied])
    if differences:
        raise ReplicasDiffer(differences)


def compare(paths: Sequence[str], hashes_RL: Tensor, copies: Sequence[Sequence[tuple[int, ...]]]) -> list[Difference]:
    """Where hashes of copies differ. `hashes_RL`: of each rank's leaves; `copies`: per leaf the groups of ranks.

    >>> import torch
    >>> from ftrain.resilience.replicas import compare
    >>> hashes_RL = torch.tensor([[11, 5], [11, 5], [12, 5]])  # three ranks, two leaves
    >>> print(*compare(["w", "b"], hashes_RL, [[(0, 1, 2)], [(0, 1, 2)]]))
    'w': of 3 copies (ranks 0, 1, 2) that of rank 2 differs from the others
    """
    differences = []
    for path, column, groups in zip(paths, hashes_RL.T.tolist(), copies, strict=True):
        for ranks in groups:
            counted = Counter(column[rank] for rank in ranks).most_common()
            if len(counted) > 1:
                majority = counted[0][0] if 2 * counted[0][1] > len(ranks) else None
                odd = tuple(r for r in ranks if majority is None or column[r] != majority)
                differences.append(Difference(path, tuple(ranks), odd))
    return differences


def copies_of(leaf: Tensor) -> list[tuple[int, ...]]:
    """The groups of two ranks and more that hold the same part of a leaf of any shape: a DTensor, or a plain tensor,
    which all ranks hold.
    """
    if not isinstance(leaf, DTensor):
        return [tuple(range(dist.get_world_size()))]
    copied = [dim for dim, placement in enumerate(leaf.placements) if placement.is_replicate()]
    ranks = leaf.device_mesh.mesh
    split = [dim for dim in range(ranks.dim()) if dim not in copied]
    groups_GR = ranks.permute(*split, *copied).reshape(-1, math.prod(ranks.shape[d] for d in copied))
    return [tuple(group) for group in groups_GR.tolist() if len(group) > 1]


def _held(leaf: Tensor) -> Tensor:
    return leaf.to_local() if isinstance(leaf, DTensor) else leaf


def _gather(own_L: Tensor) -> Tensor:
    """The hashes of all ranks, [rank, leaf], on the CPU."""
    own_L = own_L.cuda() if dist.get_backend() == "nccl" else own_L.cpu()
    hashes = [torch.empty_like(own_L) for _ in range(dist.get_world_size())]
    dist.all_gather(hashes, own_L)
    return torch.stack(hashes).cpu()
