"""What a run trains, as pure functions: a model, a task, an optimizer, and an adapter where only that is trained.

The state is a `TrainState`. `params` is what is trained: the model's parameters, or with an adapter its deltas.
`extra["base"]` has what stays as it is: with an adapter the model's parameters, else those that the task compares with;
it is absent where there is nothing of the kind.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ftrain
from ftrain import lora, optim
from ftrain.kernels import random
from ftrain.kernels.mean import Mean, sum_over_batch
from ftrain.modules.model import Model
from ftrain.modules.spec import Tree, map_with_paths
from ftrain.step.state import TrainState
from ftrain.tasks.task import Task

BASE = "base"


@dataclass(frozen=True)
class Recipe:
    """A training run's pure functions: `init`, `train_step` and `evaluate`.

    - `model`, `task`: what is trained, and for what.
    - `tx`: the optimizer, whose state begins with that of `optim.clip_by_global_norm` (a `chain`): see `optimizer`.
    - `adapter`: None trains all parameters.
    - `teacher`: for a task that compares with another model than its own; its parameters are the base.
    - `micro_batches`: that a step's batch is divided into, one after the other.
    - `base_dtype`: of the parameters that are not trained.
    - `seed`: of dropout.
    """

    model: Model
    task: Task
    tx: optim.Transform
    adapter: lora.Adapter | None = None
    teacher: Model | None = None
    micro_batches: int = 1
    base_dtype: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model.state:
            raise ValueError(
                f"{self.model.name} changes a state in its forward pass ({', '.join(self.model.state)}), which a "
                "recipe does not carry: write the step by hand (README, 'A step'), with model.loss(..., state=...)"
            )
        if self.teacher is not None and self.adapter is not None:
            raise ValueError("a teacher beside an adapter: two bases at once are not carried; train all parameters")

    @property
    def specs(self) -> Tree:
        """The `ParamSpec`s of all parameters in the state, for `ftrain.jit(specs=...)` and checkpoints."""
        if self.adapter is not None:
            return self.adapter.all_specs()
        return self.model.specs if self.teacher is None else {"params": self.model.specs, BASE: self.teacher.specs}

    @property
    def has_base(self) -> bool:
        """Whether the state carries parameters that are not trained."""
        return self.adapter is not None or self.task.compares

    def init(self, key: Tensor) -> TrainState:
        """A state at step 0 with fresh parameters from the key, int64 `[2]`; `load` puts those of folders into it."""
        of = self.teacher or self.model
        base = {BASE: self._narrow(ftrain.init(of.specs, random.fold_in(key, 1)))} if self.has_base else {}
        trained = self.adapter.init(key) if self.adapter is not None else ftrain.init(self.model.specs, key)
        return TrainState.create(trained, self.tx, extra=base)

    def load(self, state: TrainState) -> None:
        """Write the weights of the models' folders into a state, each rank its own parts. ValueError for a model
        without a folder.
        """
        if self.has_base:
            _fill(self.teacher or self.model, state.extra[BASE])
        if self.adapter is None:
            _fill(self.model, state.params)

    def train_step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """One update, and metrics: `loss`, each term by its name, `grad_norm` before clipping, `labels` (how many)."""
        key = random.fold_in(ftrain.key(self.seed, device=state.step.device), state.step)
        loss = self._loss(state.extra.get(BASE), key)
        loss = ftrain.accumulate(loss, self.micro_batches, has_aux=True) if self.micro_batches > 1 else loss
        (value, terms), grads = ftrain.value_and_grad(loss, has_aux=True)(state.params, batch)
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
            return self._loss(state.extra.get(BASE), None)(params, batch)

        loss, terms = ftrain.forward(of)(state.params, batch)
        mean = loss if isinstance(loss, Mean) else Mean(loss.value(), torch.ones(()))
        return {"loss": mean, **terms}

    def parameters(self, state: TrainState) -> Tree:
        """The model's parameters after training, merged with the adapter's deltas, for `model.save`."""
        if self.adapter is None:
            return state.params
        return lora.merge(state.extra[BASE], state.params, self.adapter)

    def _loss(self, base: Tree | None, key: Tensor | None) -> Callable[[Tree, Any], tuple[Any, dict[str, Mean]]]:
        def loss(trained: Tree, batch: Any) -> tuple[Any, dict[str, Mean]]:
            seen = None if base is None else ftrain.forward(lambda tree: tree)(base)
            return self.task.loss(self.model, self._bound(trained, seen, key), batch, key=key, **self._compared(seen))

        return loss

    def _bound(self, trained: Tree, base: Tree | None, key: Tensor | None) -> Tree:
        return trained if self.adapter is None else lora.bind(base, trained, self.adapter, key=key)

    def _compared(self, base: Tree | None) -> Mapping[str, Any]:
        if not self.task.compares:
            return {}
        return {"reference": base} if self.teacher is None else {"reference": base, "teacher": self.teacher}

    def _narrow(self, params: Tree) -> Tree:
        if self.base_dtype is None:
            return params
        return map_with_paths(lambda _, p: p.to(self.base_dtype) if p.is_floating_point() else p, params)


def optimizer(
    rate: optim.Schedule, *, clip: float, weight_decay: float, b1: float = 0.9, b2: float = 0.999
) -> optim.Transform:
    """AdamW behind clipping by the global norm; matrices decay, vectors do not, and a step whose gradients are not
    finite changes nothing. Errors are those of the transforms.
    """
    adamw = optim.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=_matrices)
    return optim.chain(optim.clip_by_global_norm(clip), optim.skip_nonfinite(adamw))


def _matrices(params: Tree) -> Tree:
    return ftrain.tree.map(lambda leaf: leaf.dim() >= 2, params)


def _fill(model: Model, params: Tree) -> None:
    if model.load is None:
        raise ValueError(f"{model.name} has no folder to load weights from")
    model.load(params)
