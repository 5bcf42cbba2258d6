"""Private torch.distributed names that the floor uses, with one canary test each."""

import torch.distributed as dist
from torch._C import _distributed_c10d as _c10d


def register_group(name: str, group: dist.ProcessGroup) -> None:
    """Let collectives in a graph name `group` by a text that is the same on every rank."""
    _c10d._register_process_group(name, group)


def unregister_group(name: str) -> None:
    """Forget a name given by `register_group`; needed before the process group is destroyed."""
    _c10d._unregister_process_group(name)


def resolve_group(name: str) -> dist.ProcessGroup:
    """The group registered under a name; RuntimeError if there is none."""
    return _c10d._resolve_process_group(name)


def rank_in_group(name: str) -> int:
    """This process's position in a registered group."""
    return dist.get_rank(resolve_group(name))
