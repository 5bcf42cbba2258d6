"""Private torch.distributed names that the floor uses, with one canary test each."""

import json
import operator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as _c10d
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta


def register_group(name: str, group: Any) -> None:
    """Let collectives in a graph name `group` by a text that is the same on every rank."""
    _c10d._register_process_group(name, group)  # type: ignore[arg-type]


def unregister_group(name: str) -> None:
    """Forget a name given by `register_group`; needed before the process group is destroyed."""
    _c10d._unregister_process_group(name)  # type: ignore[arg-type]


def resolve_group(name: str) -> dist.ProcessGroup:
    """The group registered under a name; RuntimeError from torch if there is none."""
    return _c10d._resolve_process_group(name)  # type: ignore[arg-type]


def has_group(name: str) -> bool:
    """True if a group is registered under the name."""
    try:
        _c10d._resolve_process_group(name)  # type: ignore[arg-type]
    except RuntimeError:
        return False
    return True


def group_timeout() -> Any:
    """The timeout (a `timedelta`) of the default process group: new groups would otherwise wait half an hour."""
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    return dist.group.WORLD._get_backend(device).options._timeout  # type: ignore[union-attr]


def default_store() -> Any:
    """The store through which the processes found each other."""
    return dist.distributed_c10d._get_default_store()


def rank_in_group(name: str) -> int:
    """This process's position in a registered group, from 0."""
    return dist.get_rank(resolve_group(name))


spec_of = operator.attrgetter("_spec")
"""How a DTensor is divided: its mesh, placements, and the whole array's shape, strides and dtype."""


local_of = operator.attrgetter("_local_tensor")
"""The tensor that a DTensor holds here, itself and not a view as from `to_local`."""


set_local = DTensor.__dict__["_local_tensor"].__set__
"""Give a DTensor another tensor to hold; built in C, since every step does it for each leaf."""


def dtensor_like(local: Tensor, spec: Any) -> DTensor:
    """A DTensor around `local` (this rank's part, of its local shape), unchecked and without a gradient.

    `spec`: of another DTensor (`spec_of`): its mesh, placements and global shape.
    """
    return DTensor(local, spec, requires_grad=False)


def make_dtensor(local: Tensor, mesh: Any, placements: list[Any], shape: tuple[int, ...]) -> DTensor:
    """A DTensor of global `shape` around `local`, unchecked and without a gradient."""
    strides = torch.empty(shape, device="meta").stride()
    spec = DTensorSpec(mesh, tuple(placements), tensor_meta=TensorMeta(torch.Size(shape), strides, local.dtype))
    return DTensor(local, spec, requires_grad=False)


# Backends keep a record each: gloo's, and NCCL's where this torch has NCCL.
_RECORDERS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")


def flight_record() -> str:
    """torch's record of the collectives of this process, the oldest first: a line of JSON per backend that ran any.

    Empty if none did. TORCH_FR_BUFFER_SIZE says how many collectives are kept.
    """
    dumps = [getattr(_c10d, name) for name in _RECORDERS if hasattr(_c10d, name)]
    records = [json.loads(dump(True, False)) for dump in dumps]
    return "\n".join(json.dumps(record) for record in records if record.get("entries"))
