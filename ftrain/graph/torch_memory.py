"""Private torch names about memory: which tensors share it, who refers to it, how often it was written; one canary test
each.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from sys import getrefcount
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


def addresses_equal(tensors: Sequence[Tensor], addresses: Sequence[int], slots: Sequence[int]) -> bool:
    """True if `tensors[i]` lies at `addresses[i]` (`data_ptr`) for all i of `slots`; in C++ where torch was built for
    CUDA.
    """
    compare = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
    if compare is not None:
        return compare(tensors, addresses, slots)
    return [tensors[i].data_ptr() for i in slots] == [addresses[i] for i in slots]


def storage_id(tensor: Tensor) -> int:
    """Identity of the memory that a tensor of any shape looks at; equal for views of one another, also for fake
    tensors.
    """
    return tensor.untyped_storage()._cdata


_identity_of = attrgetter("_cdata")


_handles_of: Callable[[Tensor], int] = Tensor._use_count  # type: ignore[attr-defined]


class References(NamedTuple):
    """How many references there are to the memory of some tensors, each a list in their order; built in C, since every
    step asks for each leaf of its state.
    """

    memory: list[int]
    """Of tensors to a memory: views, detached tensors, numpy's arrays."""
    objects: list[int]
    """Of Python to the objects that stand for a memory (`untyped_storage`)."""
    handles: list[int]
    """Of C++ to a tensor: values that a backward needs, DLPack."""


def storage_ids(tensors: Sequence[Tensor]) -> list[int]:
    """`storage_id` of each, which are not those of memory that was freed as long as there is a `weak_reference`."""
    return [*map(_identity_of, map(Tensor.untyped_storage, tensors))]


def references(tensors: Sequence[Tensor]) -> tuple[list[int], References]:
    """`storage_ids`, and the references to these tensors' memory at this moment."""
    storages = [*map(Tensor.untyped_storage, tensors)]
    ids = [*map(_identity_of, storages)]
    memory, handles = [*map(torch._C._storage_Use_Count, ids)], [*map(_handles_of, tensors)]
    return ids, References(memory, [*map(getrefcount, storages)], handles)


def weak_reference(tensor: Tensor) -> Any:
    """Keeps the identity of the memory of a tensor of any shape from being used again, and not the memory."""
    return StorageWeakRef(tensor.untyped_storage())


plain_functions: Callable[[], Any] = torch._C.DisableTorchFunctionSubclass
"""A context in which classes of tensors have no say in what torch's functions do."""


def set_memory(tensor: Tensor, other: Tensor) -> None:
    """Let a tensor of any class look at the memory of `other`, with its shape and dtype."""
    with plain_functions():
        tensor.data = other


def version_of(tensor: Tensor) -> int:
    """How often the memory of a tensor (any shape) was written in place by eager code, through any view of it.

    0 for inference tensors, of which torch does not count it.
    """
    return 0 if tensor.is_inference() else tensor._version


def tensor_without_memory(kind: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of a subclass `kind` with this shape and without elements, for one that computes by `__torch_function__`
    and `__torch_dispatch__` alone; in a trace it is no node.
    """
    return Tensor._make_wrapper_subclass(kind, tuple(shape), dtype=dtype, device=device)
