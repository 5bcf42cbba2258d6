"""What the parts of a random step share while it is written: its arguments, and what can be read outside of losses."""

import random
from typing import Any

import torch
from torch import Tensor

from experiments.bench.fuzzing.program import Program, leaf_paths
from experiments.bench.fuzzing.scope import Scope
from experiments.bench.fuzzing.source import load


class Writer:
    """A program under way. `scope`: of the step itself; `subtrees`: by what losses may be differentiated; `micro`: how
    many micro-batches they run over.
    """

    def __init__(self, rng: random.Random, program: Program, subtrees: list[str], micro: int) -> None:
        self.rng, self.program, self.subtrees, self.micro = rng, program, subtrees, micro
        names = load(program)
        state, self.batch = names["make_state"](), names["make_batch"](program.options.rows[0])
        self.on_mesh = program.options.mesh is not None
        self.scope = Scope(rng, {**names, "state": state, "batch": self.batch}, by_rows=self.on_mesh)
        for path in self.paths("state"):
            self.scope.give(path, self.value(path))
        for name, _ in program.captured:
            self.scope.give(name, names[name])
            self.scope.give(f"{name}[:]", names[name][:])

    def paths(self, subtree: str) -> list[str]:
        """Expressions of the leaves of the state that are below this one."""
        below = (f"{subtree}[", f"{subtree}.")
        return [p for p in leaf_paths(self.program.tree, "state") if p == subtree or p.startswith(below)]

    def value(self, expression: str) -> Any:
        """What an expression of the step is."""
        return eval(expression, self.scope.names)

    def give_batch(self, scope: Scope, *, whole: bool = False) -> None:
        """Let lines read the batch; in losses, unless it is the `whole` one, a micro-batch."""
        scope.names["batch"] = self.batch if whole else self.micro_batch()
        for key in self.batch:
            scope.give(f'batch["{key}"]', scope.names["batch"][key], rows=True)

    def micro_batch(self) -> dict[str, Tensor]:
        """The batch as losses see it."""
        return self.batch if self.micro == 1 else {key: leaf[0] for key, leaf in self.batch.items()}

    def shown(self, leaf: Any) -> Any:
        """A leaf as losses see it."""
        if not isinstance(leaf, Tensor):
            return leaf
        low = self.program.options.precision is not None and leaf.dtype == torch.float32
        return leaf.to(torch.bfloat16) if low else leaf.clone()


def is_float(value: Any) -> bool:
    """True for a floating tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()


def is_alike(value: Any, other: Tensor) -> bool:
    """True for a floating tensor of this shape and dtype."""
    return is_float(value) and value.shape == other.shape and value.dtype == other.dtype
