"""What a run trains, as pure functions: a model, a task, an optimizer, and an adapter where only that is trained.

The state is a `TrainState`. `params` is what is trained: the model's parameters, or with an adapter its deltas.
`extra["base"]` has what is compared with or built upon: with an adapter the model's parameters, else those that the
task compares with. `extra["frozen"]` has the model's parameters that are not trained. Either is absent where there is
nothing of the kind.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ftrain import lora, optim, tree
from ftrain.kernels import random
from ftrain.kernels.mean import Mean, sum_over_batch
from ftrain.lora.trees import joined
from ftrain.modules.model import Model
from ftrain.modules.spec import Tree, abstract, init, leaves_with_paths, map_with_paths
from ftrain.run.parts import part, union
from ftrain.step.state import TrainState
from ftrain.tasks.heads import HEAD, Headed
from ftrain.tasks.task import Task
from ftrain.trace.accumulate import accumulate
from ftrain.trace.grad import forward, value_and_grad

BASE, FROZEN = "base", "frozen"


@dataclass(frozen=True)
class Recipe:
    """A training run's pure functions: `init`, `train_step` and `evaluate`.

    - `model`, `task`: what is trained, and for what.
    - `tx`: the optimizer, whose state begins with that of `optim.clip_by_global_norm` (a `chain`): see `optimizer`.
    - `adapter`: None trains all parameters.
    - `teacher`: for a task that compares with another model than its own; its parameters are the base.
    - `micro_batches`: that a step's batch is divided into, one after the other.
    - `base_dtype`: of the parameters that are not trained. `seed`: of dropout.
    - `trained`: the paths of the parameters that are trained (`ftrain.run.parts.trained_paths`); None: all are. Others
      cost no gradient, no optimizer state and no part of the norm.
    - `quantized`: with an adapter, how the matrices below it are kept (`ftrain.lora.quantize`); None: as they are.

    A task with a head has it beside what else is trained: `params` is then `{"model": ..., "task_head": ...}`.
    ValueError for a model with a state, and for an adapter together with a teacher or frozen parts.
    """

    model: Model
    task: Task
    tx: optim.Transform
    adapter: lora.Adapter | None = None
    teacher: Model | None = None
    micro_batches: int = 1
    base_dtype: torch.dtype | None = None
    seed: int = 0
    trained: frozenset[str] | None = None
    quantized: Literal["int8", "nf4"] | None = None

    def __post_init__(self) -> None:
        if self.model.state:
            raise ValueError(
                f"{self.model.name} changes a state in its forward pass ({', '.join(self.model.state)}), which a "
                "recipe does not carry: write the step by hand (README, 'A step'), with model.loss(..., state=...)"
            )
        if self.teacher is not None and self.adapter is not None:
            raise ValueError("a teacher beside an adapter: two bases at once are not carried; train all parameters")
        if self.trained is not None and self.adapter is not None:
            raise ValueError("an adapter freezes all of the model: choose its targets in the place of frozen parts")
        if self.quantized is not None and (self.adapter is None or self.adapter.dora):
            raise ValueError("a quantized model is trained by an adapter without magnitudes (dora=False)")

    @property
    def specs(self) -> Tree:
        """The `ParamSpec`s of all parameters in the state, for `ftrain.jit(specs=...)` and checkpoints."""
        if self.teacher is not None:
            return {"params": self.model.specs, BASE: self.teacher.specs}
        own = self.model.specs if self.adapter is None else joined(_base_specs(self), self.adapter.specs)
        return {**own, **self.head}

    @property
    def head(self) -> Tree:
        """The specs of the task's head; empty for most."""
        return self.task.head_specs(self.model) if isinstance(self.task, Headed) else {}

    @property
    def has_base(self) -> bool:
        """Whether the state carries parameters that are not trained."""
        return self.adapter is not None or self.task.compares

    def init(self, key: Tensor) -> TrainState:
        """A state at step 0 with fresh parameters from the key, int64 `[2]`; `load` puts those of folders into it."""
        base = init(_base_specs(self), random.fold_in(key, 1)) if self.has_base else None
        adapter = self.adapter
        trained = init(self.model.specs, key) if adapter is None else adapter.init(key, base=base)
        return self._state(trained, base, init(self.head, random.fold_in(key, 2)))

    def abstract(self) -> TrainState:
        """The shapes of a state, on the meta device: for a search of layouts."""
        base = abstract(_base_specs(self)) if self.has_base else None
        trained = abstract(self.model.specs if self.adapter is None else self.adapter.specs)
        return self._state(trained, base, abstract(self.head))

    def _state(self, trained: Tree, base: Tree | None, head: Tree) -> TrainState:
        extra = {} if base is None else {BASE: _narrow(self, base)}
        if self.trained is not None:
            left = {path for path, _ in leaves_with_paths(self.model.specs)} - self.trained
            extra[FROZEN], trained = _narrow(self, part(trained, left)), part(trained, self.trained)
        return TrainState.create({"model": trained, **head} if head else trained, self.tx, extra=extra)

    def load(self, state: TrainState) -> None:
        """Write the weights of the models' folders into a state, each rank its own parts. ValueError for a model
        without a folder.
        """
        if self.quantized is not None:
            _fill_quantized(self.model, state.extra[BASE], self.quantized)
        elif self.has_base:
            _fill(self.teacher or self.model, state.extra[BASE])
        if self.adapter is None:
            _fill(self.model, self.parameters(state))
        elif self.adapter.dora:
            own = self.trained_part(state.params)
            measured = self.adapter.init(random.key(0), base=state.extra[BASE])
            for (path, leaf), (_, new) in zip(leaves_with_paths(own), leaves_with_paths(measured), strict=True):
                if path.endswith(".magnitude"):
                    leaf.copy_(new)

    def train_step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """One update, and metrics: `loss`, each term by its name, `grad_norm` before clipping, `labels` (how many)."""
        key = random.fold_in(random.key(self.seed, device=state.step.device), state.step)
        loss = self._loss(state.extra, key)
        loss = accumulate(loss, self.micro_batches, has_aux=True) if self.micro_batches > 1 else loss
        (value, terms), grads = value_and_grad(loss, has_aux=True)(state.params, batch)
        updated = state.apply(self.tx, grads)
        return updated, {
            "loss": value,
            "terms": {name: term.value() for name, term in terms.items()},
            "grad_norm": updated.opt_state[0].norm,
            "labels": sum_over_batch((batch["labels"] != -100).sum()),
            "skipped_in_a_row": updated.opt_state[1].skipped_in_a_row,
        }

    def evaluate(self, state: TrainState, batch: Any) -> dict[str, Mean]:
        """The loss and the terms of a batch as `Mean`s by name, nothing dropped; those of many batches are pooled."""

        def of(params: Tree, batch: Any) -> Any:
            return self._loss(state.extra, None)(params, batch)

        loss, terms = forward(of)(state.params, batch)
        mean = loss if isinstance(loss, Mean) else Mean(loss.value(), torch.ones(()))
        return {"loss": mean, **terms}

    def parameters(self, state: TrainState) -> Tree:
        """The model's parameters after training, merged with the adapter's deltas, for `model.save`."""
        trained = self.trained_part(state.params)
        if self.adapter is not None:
            return lora.merge(state.extra[BASE], trained, self.adapter)
        return union(trained, state.extra[FROZEN]) if self.trained is not None else trained

    def seen(self, state: TrainState) -> Tree:
        """The model's parameters as its loss sees them, nothing dropped and nothing copied: for generation."""
        return _bound(self, self.trained_part(state.params), state.extra, None)

    def head_weight(self, state: TrainState) -> Tensor | None:
        """The head that was trained, `[C, D]`, whole; None for tasks without one. All ranks call this together."""
        if not self.head:
            return None
        found = state.params[HEAD]
        return (found.full_tensor() if isinstance(found, DTensor) else found).t()

    def trained_part(self, params: Tree) -> Tree:
        """What is trained of the model, without the task's head."""
        return params["model"] if self.head else params

    def _loss(self, extra: Tree, key: Tensor | None) -> Callable[[Tree, Any], tuple[Any, dict[str, Mean]]]:
        def loss(trained: Tree, batch: Any) -> tuple[Any, dict[str, Mean]]:
            seen = forward(lambda tree: tree)(extra)
            params = _bound(self, self.trained_part(trained), seen, key)
            return self.task.loss(self.model, params, batch, key=key, **_beside(self, trained, seen.get(BASE)))

        return loss


def _base_specs(recipe: Recipe) -> Tree:
    specs = (recipe.teacher or recipe.model).specs
    return specs if recipe.quantized is None else lora.quantized_specs(specs, recipe.quantized)


def _bound(recipe: Recipe, trained: Tree, extra: Tree, key: Tensor | None) -> Tree:
    if recipe.adapter is not None:
        return lora.bind(extra[BASE], trained, recipe.adapter, key=key)
    return union(trained, extra[FROZEN]) if recipe.trained is not None else trained


def _beside(recipe: Recipe, trained: Tree, base: Tree | None) -> Mapping[str, Any]:
    """What the loss takes beside the parameters of the model."""
    if recipe.head:
        return {"head": {name: trained[name] for name in recipe.head}}
    if not recipe.task.compares:
        return {}
    if recipe.quantized is not None and recipe.adapter is not None:
        return {"reference": lora.bind(base, {}, replace(recipe.adapter, targets=()))}
    return {"reference": base} if recipe.teacher is None else {"reference": base, "teacher": recipe.teacher}


def _narrow(recipe: Recipe, params: Tree) -> Tree:
    if recipe.base_dtype is None:
        return params
    return map_with_paths(lambda _, p: p.to(recipe.base_dtype) if p.is_floating_point() else p, params)


def optimizer(
    rate: optim.Schedule, *, clip: float, weight_decay: float, b1: float = 0.9, b2: float = 0.999, plus: float = 1.0
) -> optim.Transform:
    """AdamW behind clipping by the global norm; matrices decay, vectors do not, and a step whose gradients are not
    finite changes nothing. `plus`: how much faster the `B` of an adapter learn (`lora.plus`). Errors are those of the
    transforms.
    """

    def adamw(rate: Any) -> optim.Transform:
        return optim.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=_matrices)

    inner = adamw(rate) if plus == 1.0 else lora.plus(adamw, rate, ratio=plus)
    return optim.chain(optim.clip_by_global_norm(clip), optim.skip_nonfinite(inner))


def _matrices(params: Tree) -> Tree:
    return tree.map(lambda leaf: leaf.dim() >= 2, params)


def _fill(model: Model, params: Tree) -> None:
    if model.load is None:
        raise ValueError(f"{model.name} has no folder to load weights from")
    model.load(params)


def _fill_quantized(model: Model, base: Tree, format: Literal["int8", "nf4"]) -> None:
    """Read the whole weights, and write their codes into a base, each rank its own parts."""
    if model.load is None:
        raise ValueError(f"{model.name} has no folder to load weights from")
    made = lora.quantize(model.load(), model.specs, format)
    for (_, leaf), (_, new) in zip(leaves_with_paths(base), leaves_with_paths(made), strict=True):
        if isinstance(leaf, DTensor):
            own = distribute_tensor(new.to(leaf.device), leaf.device_mesh, leaf.placements, src_data_rank=None)
            leaf.to_local().copy_(own.to_local())
        else:
            leaf.copy_(new)
