"""A plan that is given by name, and chosen when the step is first used."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ftrain.remat.policy import Remat
from ftrain.step.plan_source import Chooser, Wanted
from ftrain.step.sharded import ShardedStep
from ftrain.step.trace_cache import Options


@dataclass(frozen=True)
class DeferredPlan:
    """Where the plan comes from, and the options of `jit` that then matter.

    `remat`: None to take what the choice says.
    """

    chooser: Chooser
    specs: Any
    batch: str
    overlap: bool
    remat: Remat | None

    def decide(
        self, fn: Callable, names: Sequence[str], args: tuple | None, options: Options, *, whole: bool
    ) -> tuple[ShardedStep | None, Remat]:
        """The plan at work, None for a single rank, and what the step recomputes.

        `args`: those of a call, with these names, if there are any; `whole`: they are known to be of the whole mesh.
        """
        wanted = Wanted(
            step=fn,
            specs=self.specs,
            batch=self.batch,
            names=tuple(names),
            precision=options.precision,
            donates=options.donate is not None,
            arguments=args,
            whole=whole,
        )
        plan, remat = self.chooser.choose(wanted)
        sharded = None
        if plan is not None:
            sharded = ShardedStep(plan, specs=self.specs, batch=self.batch, overlap=self.overlap)
        return sharded, remat if self.remat is None else self.remat
