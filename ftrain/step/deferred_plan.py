"""A plan that is given by name, and chosen when the step is first used."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ftrain.remat.policy import Remat
from ftrain.sharding.plan import Plan
from ftrain.step.compile import name_of
from ftrain.step.plan_source import PlanRequest, PlanSource
from ftrain.step.sharded import ShardedStep
from ftrain.step.trace_cache import Options


@dataclass(frozen=True)
class DeferredPlan:
    """Where the plan comes from (`source`), and the options of `jit` that are needed once it is known.

    `remat`: None to take the one that comes with the plan.
    """

    source: PlanSource
    specs: Any
    batch: str
    overlap: bool
    remat: Remat | None

    def decide(
        self,
        fn: Callable[..., Any],
        names: Sequence[str],
        args: tuple[Any, ...] | None,
        options: Options,
        *,
        whole: bool,
    ) -> tuple[ShardedStep | None, Remat]:
        """Choose the plan. Returns the step on its mesh, None for a single rank, and what the step recomputes.

        `fn` with its `options`: of the step. `args`: those of a call, with these `names`, or None; `whole`: they are
        known to be of the whole mesh. ValueError for a plan of several ranks where none of the names is the batch's.
        """
        request = PlanRequest(
            step=fn,
            specs=self.specs,
            batch=self.batch,
            names=tuple(names),
            precision=options.precision,
            donates=options.donate is not None,
            arguments=args,
            whole=whole,
        )
        plan, remat = self.source.choose(request)
        sharded = None
        if plan is not None:
            require_batch(fn, names, self.batch, plan)
            sharded = ShardedStep(plan, specs=self.specs, batch=self.batch, overlap=self.overlap)
        return sharded, remat if self.remat is None else self.remat


def require_batch(fn: Callable[..., Any], names: Sequence[str], batch: str, plan: Plan) -> None:
    """ValueError for a step `fn` of several arguments (`names`), none of which is called `batch`, on a plan of several
    ranks: no argument would be divided among the ranks.
    """
    if plan.mesh.size > 1 and len(names) > 1 and batch not in names:
        raise ValueError(
            f"{name_of(fn)}({', '.join(names[:8])}) has no argument {batch!r}, so every rank would compute all of the "
            f"data: call that argument {batch!r}, or name it in jit(batch=...)"
        )
