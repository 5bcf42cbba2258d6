"""A plan file as options of a run: its mesh and its packs, which the command line need not say again."""

from dataclasses import dataclass
from pathlib import Path

from ftrain.cli.train_options import TrainOptions
from ftrain.plan.file import PlanFile, load_plan
from ftrain.run.ranks import MeshFlags
from ftrain.run.training import AUTO

_AXES = ("replicate", "shard", "sequence", "expert")


@dataclass(frozen=True)
class Planned:
    """The plan that `ftrain plan --apply` wrote into a `file`."""

    file: Path
    plan: PlanFile

    def sizes(self, given: MeshFlags) -> MeshFlags:
        """The sizes of the plan's mesh. ValueError for others that were given."""
        chosen = self.plan.candidate
        for axis in _AXES:
            asked = getattr(given, axis)
            if asked not in (getattr(MeshFlags, axis), getattr(chosen, axis)):
                raise ValueError(
                    f"--{axis} {asked}: the plan {self.file} is {chosen}; leave the sizes out, or make another plan"
                )
        return MeshFlags(chosen.replicate, chosen.shard, chosen.sequence, chosen.expert, given.timeout)

    def require_batch(self, tokens: int, packs: int | None) -> None:
        """ValueError for packs that the plan was not made for."""
        found = self.plan
        if tokens != found.tokens or packs not in (None, found.packs):
            asked = f"--tokens {tokens}" if tokens != found.tokens else f"--packs {packs}"
            raise ValueError(
                f"{asked}: the plan {self.file} is for {found.packs} packs of {found.tokens} tokens a step: give these "
                "(--packs may be left out), or make another plan"
            )


def planned_of(options: TrainOptions) -> Planned | None:
    """The plan file of a run; None without one. ValueError for a file that is none, and for packs that it was not made
    for.
    """
    if options.plan in (None, AUTO):
        return None
    found = Planned(Path(str(options.plan)), load_plan(str(options.plan)))
    found.require_batch(options.data.tokens, options.data.packs)
    return found
