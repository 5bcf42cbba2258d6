"""How `ftrain.jit` gets a plan that is given by name: the request, and what comes back.

The search lowers steps, so it stands on `ftrain.jit`. This module holds the part that `jit` must know of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ftrain.remat.policy import Remat
from ftrain.sharding.plan import Plan
from ftrain.trace.precision import Precision


@dataclass(frozen=True)
class PlanRequest:
    """The step for which a plan is chosen.

    - `step`: the plain function. `specs`: of its parameters. `precision`: as in `ftrain.jit`.
    - `batch`: the name of the argument that ranks divide among them; `names`: of all arguments.
    - `donates`: whether the new state is written over the old one.
    - `arguments`: of a call, whole or abstract; None where the choice is made before any call.
    - `whole`: the arguments are known to be those of the whole mesh, not what one process holds.
    """

    step: Callable[..., Any]
    specs: Any
    batch: str
    names: tuple[str, ...]
    precision: Precision | None
    donates: bool
    arguments: tuple[Any, ...] | None
    whole: bool


class PlanChoice(NamedTuple):
    """A plan (None for a single rank), and what the step recomputes."""

    plan: Plan | None
    remat: Remat


class PlanSource(Protocol):
    """Something that chooses a plan: `ftrain.SavedPlan`, `ftrain.AutoPlan`."""

    def choose(self, request: PlanRequest) -> PlanChoice:
        """The plan for a step. ValueError says what does not fit, or what is not known yet."""
        ...
