"""Axes that meshes have elsewhere: what to take here instead, in one sentence.

Tensor and pipeline parallelism are not there by design; the others are called otherwise. The names are parameters of
`Mesh` that accept 1 alone, and not unknown keywords: a configuration written for another trainer is then answered, a
reader of the signature sees what is refused, and a typing error in a keyword stays Python's `TypeError`.
"""

from collections.abc import Mapping
from types import MappingProxyType

_TENSOR = (
    "there is no tensor parallelism here, by design: divide parameters with shard (gathered where they are used), long "
    "sequences with sequence, experts with expert, and make room with jit(remat=ftrain.Remat(budget=..., "
    "offload='auto'))"
)
_PIPELINE = (
    "there is no pipeline parallelism here, by design: divide parameters with shard, experts with expert, and make "
    "room with jit(remat=ftrain.Remat(budget=..., offload='auto')) or more micro-batches (ftrain.accumulate)"
)

FOREIGN: Mapping[str, str] = MappingProxyType(
    {
        "tensor": _TENSOR,
        "tp": _TENSOR,
        "pipeline": _PIPELINE,
        "pp": _PIPELINE,
        "cp": "context parallelism is called sequence here",
        "ep": "expert parallelism is called expert here",
        "dp": "data parallelism is called shard here where ranks divide the parameters too, and replicate where each "
        "holds a copy",
        "fsdp": "fully sharded data parallelism is called shard here",
    }
)
"""By the name of the axis elsewhere: why it is refused, and what to take."""


def require_own_axes(sizes: Mapping[str, int]) -> None:
    """ValueError for the first of these sizes of foreign axes that is not 1."""
    for name, size in sizes.items():
        if size != 1:
            raise ValueError(f"Mesh({name}={size!r}): {FOREIGN[name]}")
