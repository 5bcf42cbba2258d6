"""What each opaque op of all floors costs beyond its shapes; see `kernels.workspace` for what a rule is."""

from collections.abc import Callable

from kernels import workspace
from sharding import ring_cost

WORKSPACE: dict[str, Callable[..., int]] = {**workspace.WORKSPACE, **ring_cost.WORKSPACE}
FLOPS: dict[str, Callable[..., int]] = {**workspace.FLOPS, **ring_cost.FLOPS}
