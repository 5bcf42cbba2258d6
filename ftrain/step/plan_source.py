"""Plans that `ftrain.jit` is given by name: what they are chosen from, and what comes of it.

The search lowers steps, so it stands on `ftrain.jit`; here is only what `jit` must know of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ftrain.remat.policy import Remat
from ftrain.sharding.plan import Plan
from ftrain.trace.precision import Precision


@dataclass(frozen=True)
class PlanRequest:
    """For which step a plan is chosen.

    `specs`: of its parameters. `batch`: the name of the argument that ranks share out, `names` those of all. `donates`:
    whether the new state is written over the old. `arguments`: those of a call, whole or abstract; None where the
    choice is made before any were seen. `whole`: they are known to be of the whole mesh, not what one process holds.
    """

    step: Callable[..., Any]
    specs: Any
    batch: str
    names: tuple[str, ...]
    precision: Precision | None
    donates: bool
    arguments: tuple | None
    whole: bool


class PlanChoice(NamedTuple):
    """A plan, None for a single rank, and what the step recomputes."""

    plan: Plan | None
    remat: Remat


class PlanSource(Protocol):
    """A way to come by a plan: `ftrain.SavedPlan`, `ftrain.AutoPlan`."""

    def choose(self, request: PlanRequest) -> PlanChoice:
        """The plan for a step. ValueError says what does not fit, or what is not known yet."""
        ...
