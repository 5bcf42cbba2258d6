"""Workspace and FLOP rules of the opaque ops of kernels and sharding; `ftrain.kernels.workspace` defines a rule."""

from collections.abc import Callable

from ftrain.kernels import workspace
from ftrain.sharding import ring_cost

WORKSPACE: dict[str, Callable[..., int]] = {**workspace.WORKSPACE, **ring_cost.WORKSPACE}
"""By the name of an op, the function from its arguments to the bytes of its workspace."""
FLOPS: dict[str, Callable[..., int]] = {**workspace.FLOPS, **ring_cost.FLOPS}
"""By the name of an op, the function from its arguments to its FLOPs."""
