"""Arrays that are spread over ranks, whole, one after the other, for one rank to write."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ftrain.sharding.joint_calls import joint_call

Leaves = Iterator[tuple[str, Tensor]]


def write_gathered(leaves: Mapping[str, Tensor], write: Callable[[Leaves], None]) -> None:
    """Have `write` take all leaves whole, on rank 0 of all processes where one of them is a DTensor, else here.

    Every rank of their mesh calls this with the same paths: whole leaves are made by all ranks together, in order, one
    at a time. Returns on all ranks when rank 0 has written.

    Raises:
        RuntimeError: on the other ranks, when `write` has failed on rank 0, where its own error is raised.
    """
    if not _spread(leaves.values()):
        write(_whole(leaves))
        return
    joint_call("gathered a state to write it")
    left, error = _whole(leaves), None
    if dist.get_rank() == 0:
        try:
            write(left)
        except Exception as cause:
            error = cause
    # The others gather all leaves: so must a rank that has failed before the end.
    for _ in left:
        pass
    told = [None if error is None else f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(told, src=0)
    if error is not None:
        raise error
    if told[0] is not None:
        raise RuntimeError(f"rank 0 could not write the weights: {told[0]}")


def takes_part(leaves: Iterable[Tensor]) -> bool:
    """Whether this rank has to call what writes `leaves`, of any shapes and dtypes: every rank where one of them is a
    DTensor, rank 0 alone where each rank has all of them whole, since two writers of a folder are in each other's way.
    """
    return _spread(leaves) or not dist.is_initialized() or dist.get_rank() == 0


def _spread(leaves: Iterable[Tensor]) -> bool:
    return any(isinstance(leaf, DTensor) for leaf in leaves)


def _whole(leaves: Mapping[str, Tensor]) -> Leaves:
    for path, leaf in leaves.items():
        yield path, leaf.full_tensor().detach() if isinstance(leaf, DTensor) else leaf.detach()
