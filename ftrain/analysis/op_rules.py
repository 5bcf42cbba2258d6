"""What each opaque op of all floors costs beyond its shapes; see `ftrain.kernels.workspace` for what a rule is."""

from collections.abc import Callable

from ftrain.kernels import workspace
from ftrain.sharding import ring_cost

WORKSPACE: dict[str, Callable[..., int]] = {**workspace.WORKSPACE, **ring_cost.WORKSPACE}
FLOPS: dict[str, Callable[..., int]] = {**workspace.FLOPS, **ring_cost.FLOPS}
