"""Stages of a training: a workflow is a fold of them over one tree, with one folder of checkpoints.

A stage begins with a map of the tree that the one before has left (`critic <- base`, `base <- base with its deltas`),
then runs steps of its schedule. A tree saved in the middle of a stage goes on there.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ftrain import tree as trees
from ftrain.checkpoint import Checkpointer
from ftrain.kernels import random
from ftrain.optim.transform import device_of
from ftrain.run.session import Run

Tree = Any
When = Callable[[int], bool]
"""Whether something is done at a step of a stage, by its number from 0. The same on every rank: numbers of Python."""

StepFunction = Callable[[Tree, Any, Tensor], tuple[Tree, Mapping[str, Any]]]
"""`(tree, batch, key) -> (tree, metrics)`, pure, mostly jitted; `key`: int64 `[2]`, of this step and place alone, on
the device of the tree."""

Log = Callable[[str, int, Mapping[str, Any]], None]
"""`(stage, number, metrics)`, after each step; what the metrics hold may still be on the way from a device."""


def always(number: int) -> bool:
    """At each step."""
    del number
    return True


def every(steps: int) -> When:
    """At each so manieth step, the first one included. ValueError for less than 1.

    >>> [number for number in range(7) if every(3)(number)]
    [0, 3, 6]
    """
    if steps < 1:
        raise ValueError(f"every({steps}): a step is done at each 1st, 2nd, ... time")
    return lambda number: number % steps == 0


@dataclass(frozen=True)
class Stage:
    """A part of a training with one purpose.

    - `name`: of the stage; its steps' keys follow from it.
    - `steps`: how many it has.
    - `schedule`: pairs of a `When` and a step. At each step number those that are due run in this order, with one
      batch. Variants that a trace takes as constants are pairs of their own: `(lambda n: exit_step(seed, n, 4) == 2,
      partial(student_step, exit=2))`.
    - `data`: the batch of a number from 0, a pure function.
    - `start`: from the tree that the stage before has left, and a key (int64 `[2]`), to the tree of this one. It also
      runs, for the tree's structure alone, where a run goes on in this stage or a later one.

    ValueError for a stage without steps or schedule.
    """

    name: str
    steps: int
    schedule: Sequence[tuple[When, StepFunction]]
    data: Callable[[int], Any]
    start: Callable[[Tree, Tensor], Tree] = lambda tree, key: tree

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.schedule:
            raise ValueError(
                f"stage {self.name!r}: steps={self.steps}, {len(self.schedule)} in its schedule: both >= 1"
            )

    def key(self, seed: int) -> Tensor:
        """The stage's key, int64 `[2]`, of a run's seed: whatever stages come before."""
        return random.fold_in(random.key(seed), zlib.crc32(self.name.encode()))


def fold(
    stages: Sequence[Stage],
    tree: Tree,
    *,
    seed: int,
    checkpoints: Checkpointer | None = None,
    save: int = 0,
    log: Log | None = None,
    run: Run | None = None,
) -> Tree:
    """The tree that the last stage leaves, of the tree before the first one.

    - `checkpoints`: where the tree is saved at the end of each stage, and each `save` steps (0: only there); a folder
      that has some is gone on from.
    - `run`: ends the fold early where it is stopping, with a save.

    ValueError for stages of one name, a step that changes the tree's structure or reports what another has reported,
    and for a folder of other stages. What the checkpoints raise.

    >>> import torch
    >>> def add(tree, batch, key):
    ...     return {"sum": tree["sum"] + batch}, {}
    >>> doubled = lambda tree, key: {"sum": 2 * tree["sum"]}
    >>> first = Stage("count", 3, [(always, add)], data=lambda n: n)
    >>> then = Stage("double", 1, [(always, add)], data=lambda n: 10, start=doubled)
    >>> fold([first, then], {"sum": torch.tensor(1)}, seed=0)
    {'sum': tensor(18)}
    """
    stages = tuple(stages)
    if len({stage.name for stage in stages}) < len(stages):
        raise ValueError(f"fold: stages {', '.join(stage.name for stage in stages)} must have names of their own")
    total = sum(stage.steps for stage in stages)
    done = checkpoints.latest() if checkpoints is not None else None
    if checkpoints is None or not done:
        done = 0
    else:
        tree = saved_tree(stages, tree, done, seed=seed, checkpoints=checkpoints)
    numbers = range(done + 1, total + 1) if run is None else run.steps(done, total)
    for number in numbers:
        index, at = place_of(stages, number)
        stage = stages[index]
        if at == 1:
            tree = stage.start(tree, random.fold_in(stage.key(seed), stage.steps))
        tree, metrics = _stepped(stage, tree, at - 1, seed)
        if log is not None:
            log(stage.name, at, metrics)
        over = run is not None and run.is_last
        if checkpoints is not None and (at == stage.steps or over or (save and at % save == 0)):
            checkpoints.save({"tree": tree, "stage": stage.name, "number": at}, number)
        if over:
            break
    return tree


def place_of(stages: Sequence[Stage], number: int) -> tuple[int, int]:
    """In which stage (from 0) the step of a workflow is, and which of the stage it is (from 1). ValueError behind the
    last one, or for less than 1.
    """
    before = 0
    for index, stage in enumerate(stages):
        if before < number <= before + stage.steps:
            return index, number - before
        before += stage.steps
    raise ValueError(f"step {number} is none of the {before} steps of {len(stages)} stages: give the stages it was of")


def _stepped(stage: Stage, tree: Tree, number: int, seed: int) -> tuple[Tree, dict[str, Any]]:
    """The tree after one step number (from 0), and what its steps report."""
    key, batch = random.fold_in(stage.key(seed), number).to(device_of(tree)), stage.data(number)
    metrics: dict[str, Any] = {}
    for place, (when, step) in enumerate(stage.schedule):
        if not when(number):
            continue
        before = trees.paths(tree)
        tree, found = step(tree, batch, random.fold_in(key, place))
        if trees.paths(tree) != before:
            raise ValueError(
                f"stage {stage.name!r}, step {place} of its schedule returns a tree with other leaves than it got: "
                "leaves are added in `start`"
            )
        twice = sorted(set(metrics) & set(found))
        if twice:
            raise ValueError(f"stage {stage.name!r}: two steps report {twice[0]!r}: call it another name in one")
        metrics.update(found)
    return tree, metrics


def end_of(stages: Sequence[Stage], name: str) -> int:
    """The step of the workflow that is a stage's last one. ValueError for a stage that is none of them.

    >>> end_of([Stage("a", 3, [(always, print)], print), Stage("b", 2, [(always, print)], print)], "b")
    5
    """
    names = [stage.name for stage in stages]
    if name not in names:
        raise ValueError(f"there is no stage {name!r}: stages are {', '.join(names)}")
    return sum(stage.steps for stage in stages[: names.index(name) + 1])


def saved_tree(stages: Sequence[Stage], tree: Tree, number: int, *, seed: int, checkpoints: Checkpointer) -> Tree:
    """The tree that was saved at a step of the workflow, in the form that its stage has.

    `tree`: as before the first stage. ValueError for a checkpoint of other stages. What the checkpoints raise.
    """
    index, at = place_of(stages, number)
    saved = checkpoints.restore({"stage": "", "number": 0}, number, partial=True)
    if (saved["stage"], saved["number"]) != (stages[index].name, at):
        raise ValueError(
            f"the checkpoint of step {number} is of step {saved['number']} of stage {saved['stage']!r}, and by these "
            f"stages it would be of step {at} of {stages[index].name!r}: stages that are done keep their order, names "
            "and lengths"
        )
    for stage in stages[: index + 1]:
        tree = stage.start(tree, random.fold_in(stage.key(seed), stage.steps))
    return checkpoints.restore({"tree": tree, "stage": "", "number": 0}, number)["tree"]
