"""A recipe's training step as a search of layouts sees it: any model, any task, an adapter or none; nothing is made.

The model is opened with a few of its layers, and its price is extended to all. Where layers do not repeat, the whole
model is traced.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from ftrain import tree
from ftrain.bridge.depth import Stack
from ftrain.modules.spec import Tree, leaves_with_paths
from ftrain.plan.space import Candidate, ModelShape
from ftrain.plan.step_workload import StepWorkload
from ftrain.plan.workload import WorkloadStep
from ftrain.run.example import example_batch
from ftrain.run.recipe import Recipe
from ftrain.step.plan_source import PlanRequest
from ftrain.trace.precision import Precision
from ftrain.trace.tracer import Aval, is_array

_CPU = torch.device("cpu")
_STACK = "layers"


@dataclass(frozen=True)
class RecipeWorkload:
    """The `Workload` of a recipe; each pack is taken to be one document, the longest that there can be.

    - `make_recipe(layers, micro_batches)`: the recipe of the model with so many layers (None: all of them).
    - `stack`: its layers; None where they are not known.
    - `tokens` of a pack, `packs` of a step. `leaves`: that its batch has beside those of language models.
    - `precision`: in which the loss is computed. `whole_batch`: the step cannot be divided into micro-batches.
    """

    name: str
    make_recipe: Callable[[int | None, int], Recipe]
    stack: Stack | None
    tokens: int
    packs: int
    leaves: tuple[str, ...] = ()
    precision: Precision | None = None
    whole_batch: bool = False
    _made: dict[Any, Recipe] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def stacks(self) -> Mapping[str, int]:
        """The turns of layers, where the parameters grow by the same with each; else none, and all are traced."""
        stack = self.stack
        if stack is None or stack.turns < 4:
            return {}
        two, three, all_of = (_kinds(self._recipe(turns, 1).specs) for turns in (2, 3, stack.turns))
        turn = Counter({kind: three[kind] - two[kind] for kind in three})
        grown = {kind: two[kind] + (stack.turns - 2) * turn[kind] for kind in three}
        return {_STACK: stack.turns} if grown == dict(all_of) else {}

    @cached_property
    def model_shape(self) -> ModelShape:
        """Read off traces on one device, of a few layers where they repeat. ValueError as `StepWorkload` raises it."""
        whole = self.stacks.get(_STACK)
        if whole is None:
            found = self._shape(None)
        else:
            two, three = self._shape(2), self._shape(3)

            def line(name: str) -> Any:
                a, b = getattr(two, name), getattr(three, name)
                return a + (whole - 2) * (b - a)

            found = replace(
                three, layers=line("layers"), weight_flops=line("weight_flops"), attention_flops=line("attention_flops")
            )
        return replace(found, most_micro=1 if self.whole_batch else self.packs)

    def make(self, depths: Mapping[str, int], candidate: Candidate) -> WorkloadStep:
        """The training step of the model with so many turns of layers. ValueError as the recipe raises it."""
        recipe = self._recipe(depths.get(_STACK), candidate.micro_batches)
        state = tree.map(_abstract, recipe.abstract())
        return WorkloadStep(
            recipe.train_step, state, self._batch, recipe.specs, precision=self.precision, init=recipe.init
        )

    def _recipe(self, turns: int | None, micro_batches: int) -> Recipe:
        stack = self.stack
        layers = None if stack is None or turns in (None, stack.turns) else stack.at(int(turns or 0))
        if (layers, micro_batches) not in self._made:
            one = self._made.get((layers, 1)) or self.make_recipe(layers, 1)
            self._made[layers, 1] = one
            self._made[layers, micro_batches] = replace(one, micro_batches=micro_batches)
        return self._made[layers, micro_batches]

    def _shape(self, turns: int | None) -> ModelShape:
        recipe = self._recipe(turns, 1)
        arguments = (tree.map(_abstract, recipe.abstract()), self._batch)
        names = ("state", "batch")
        request = PlanRequest(recipe.train_step, recipe.specs, "batch", names, self.precision, True, arguments, True)
        return StepWorkload(request, packs=self.packs, rules={}, components={}).model_shape

    @cached_property
    def _batch(self) -> Any:
        """The shapes of a step's batch."""
        leaves = dict.fromkeys(self.leaves, np.dtype(np.int64))
        return tree.map(_abstract, example_batch(self.tokens, self.packs, leaves=leaves))


def _kinds(specs: Tree) -> Counter[Any]:
    """How many parameters there are of each place in a layer, shape and axes."""
    nameless = partial(re.sub, r"\d+", "N")
    return Counter((nameless(path), spec.shape, spec.axes) for path, spec in leaves_with_paths(specs))


def _abstract(leaf: Any) -> Any:
    return Aval(tuple(leaf.shape), leaf.dtype, _CPU) if is_array(leaf) else leaf
