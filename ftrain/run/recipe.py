"""What a run trains, as pure functions: a model, a task, an optimizer, and an adapter where only that is trained.

The state is a `TrainState`. `params` is what is trained: the model's parameters, or with an adapter its deltas.
`extra["base"]` has what is compared with or built upon: with an adapter the model's parameters, else those that the
task compares with. `extra["frozen"]` has the model's parameters that are not trained. `extra["start"]` has the deltas
that an adapter began with where they are a part of the model (PiSSA). `extra["model_state"]` has what the model's
forward changes, such as statistics. Each is absent where there is nothing of the kind; the last two are in checkpoints.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ftrain import lora, optim, tree
from ftrain.kernels import random
from ftrain.kernels.mean import Mean, sum_over_batch
from ftrain.lora.pieces import write
from ftrain.lora.trees import joined, leaf, part, union
from ftrain.modules.model import Model
from ftrain.modules.spec import Tree, abstract, init, leaves_with_paths, map_with_paths
from ftrain.run.averages import begin_average
from ftrain.step.state import TrainState
from ftrain.tasks.heads import HEAD, Headed
from ftrain.tasks.language import NextToken
from ftrain.tasks.task import Task
from ftrain.trace.accumulate import accumulate
from ftrain.trace.grad import forward, value_and_grad

BASE, FROZEN, START, STATE = "base", "frozen", "start", "model_state"
SAVED = (START, STATE)
"""What of `extra` only a checkpoint has; the rest is in the models' folders."""


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
    - `pissa`: the adapter begins with the largest singular directions of the model's weights, as they are in its folder
      (`ftrain.lora.pissa`).

    A task with a head has it beside what else is trained: `params` is then `{"model": ..., "task_head": ...}`.
    A model with a state (statistics of BatchNorm, balancing biases of routers) is trained with it where the task is
    next tokens and all parameters are trained; an adapter and other tasks leave the state as it is.

    ValueError for micro-batches with a state that changes by more than sums over them, for an adapter together with a
    teacher or frozen parts, and for PiSSA without an adapter that it can begin.
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
    pissa: bool = False

    def __post_init__(self) -> None:
        if self.changes_state and self.model.rebalanced is None and self.micro_batches > 1:
            raise ValueError(
                f"{self.model.name} changes a state in its forward pass ({', '.join(self.model.state)}), by all of a "
                f"step's batch at once: take micro_batches=1, not {self.micro_batches}"
            )
        if self.pissa and (self.adapter is None or self.adapter.dora or self.quantized is not None):
            raise ValueError(
                "PiSSA begins an adapter without magnitudes upon weights that are not quantized: give --lora.rank, and "
                "leave --lora.dora and --lora.quantize out"
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

    @property
    def changes_state(self) -> bool:
        """Whether a step changes the model's state, which is then carried from step to step."""
        known = isinstance(self.task, NextToken) and self.task.gives_state
        return bool(self.model.state) and known and self.adapter is None

    def init(self, key: Tensor) -> TrainState:
        """A state at step 0 with fresh parameters from the key, int64 `[2]`; `load` puts those of folders into it."""
        base = init(_base_specs(self), random.fold_in(key, 1)) if self.has_base else None
        adapter = self.adapter
        trained = init(self.model.specs, key) if adapter is None else adapter.init(key, base=base)
        state = tree.map(lambda x: x.to(key.device, copy=True), self.model.state) if self.changes_state else {}
        return self._state(trained, base, init(self.head, random.fold_in(key, 2)), state)

    def abstract(self) -> TrainState:
        """The shapes of a state, on the meta device: for a search of layouts."""
        base = abstract(_base_specs(self)) if self.has_base else None
        trained = abstract(self.model.specs if self.adapter is None else self.adapter.specs)
        state = tree.map(lambda x: torch.empty_like(x, device="meta"), self.model.state) if self.changes_state else {}
        return self._state(trained, base, abstract(self.head), state)

    def _state(self, trained: Tree, base: Tree | None, head: Tree, state: Tree) -> TrainState:
        extra = {} if base is None else {BASE: _narrow(self, base)}
        if self.pissa:
            extra[START] = tree.map(torch.clone, trained)
        if state:
            extra[STATE] = state
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
        elif self.pissa:
            lora.pissa_into(state.extra[BASE], state.extra[START], self.adapter)
            tree.map(lambda own, start: own.copy_(start), self.trained_part(state.params), state.extra[START])
        elif self.adapter.dora:
            own = self.trained_part(state.params)
            measured = self.adapter.init(random.key(0), base=state.extra[BASE])
            for (path, leaf), (_, new) in zip(leaves_with_paths(own), leaves_with_paths(measured), strict=True):
                if path.endswith(".magnitude"):
                    leaf.copy_(new)
        begin_average(state)

    def train_step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """One update, and metrics: `loss`, each term by its name, `grad_norm` before clipping, `labels` (how many)."""
        key = random.fold_in(random.key(self.seed, device=state.step.device), state.step)
        loss = _loss_of(self, state.extra, key)
        loss = accumulate(loss, self.micro_batches, has_aux=True) if self.micro_batches > 1 else loss
        (value, (terms, after)), grads = value_and_grad(loss, has_aux=True)(state.params, batch)
        updated = state.apply(self.tx, grads)
        if self.changes_state:
            good = updated.opt_state[1].skipped_in_a_row == 0
            if self.model.rebalanced is not None:
                after = self.model.rebalanced(state.extra[STATE], after)
            after = tree.map(lambda new, old: torch.where(good, new, old), after, state.extra[STATE])
            updated = updated.replace(extra={**state.extra, STATE: after})
        return updated, {
            "loss": value,
            "terms": {name: term.value() for name, term in terms.items()},
            "grad_norm": updated.opt_state[0].norm,
            "labels": sum_over_batch((batch["labels"] != -100).sum()),
            "skipped_in_a_row": updated.opt_state[1].skipped_in_a_row,
        }

    def evaluate(self, state: TrainState, batch: Any) -> dict[str, Mean]:
        """The loss and the terms of a batch as `Mean`s by name, nothing dropped; those of many batches are pooled. Of a
        sum of several losses it is the first, which the others only help (tokens further ahead, a weight on answers).
        """

        def of(params: Tree, batch: Any) -> Any:
            return _loss_of(self, state.extra, None)(params, batch)

        loss, (terms, _) = forward(of)(state.params, batch)
        return {"loss": loss if isinstance(loss, Mean) else loss.terms[0], **terms}

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


def kept(state: TrainState) -> TrainState:
    """What a checkpoint holds of a recipe's state: all but the parameters that a folder has."""
    return state.replace(extra={name: x for name, x in dict(state.extra).items() if name in SAVED})


def restored(recipe: Recipe, found: TrainState, loaded: TrainState) -> TrainState:
    """The state that goes on: what a checkpoint of `kept` held, and of the `loaded` state what it did not."""
    if recipe.pissa and recipe.adapter is not None:
        lora.shift_base(loaded.extra[BASE], loaded.extra[START], found.extra[START], recipe.adapter)
    return found.replace(extra={**loaded.extra, **found.extra})


def _loss_of(
    recipe: Recipe, extra: Tree, key: Tensor | None
) -> Callable[[Tree, Any], tuple[Any, tuple[dict[str, Mean], Tree]]]:
    """The loss of what is trained and a batch, and beside it the task's terms and what makes the model's new state."""

    def loss(trained: Tree, batch: Any) -> tuple[Any, tuple[dict[str, Mean], Tree]]:
        seen = forward(lambda tree: tree)({name: x for name, x in dict(extra).items() if name != STATE})
        params = _bound(recipe, recipe.trained_part(trained), seen, key)
        beside = _beside(recipe, trained, seen)
        if not recipe.changes_state:
            value, terms = recipe.task.loss(recipe.model, params, batch, key=key, **beside)
            return value, (terms, {})
        (value, after), terms = recipe.task.loss(
            recipe.model, params, batch, key=key, **{"state": extra[STATE], **beside}
        )
        return value, (terms, after)

    return loss


def _base_specs(recipe: Recipe) -> Tree:
    specs = (recipe.teacher or recipe.model).specs
    return specs if recipe.quantized is None else lora.quantized_specs(specs, recipe.quantized)


def _bound(recipe: Recipe, trained: Tree, extra: Tree, key: Tensor | None) -> Tree:
    if recipe.adapter is not None:
        return lora.bind(extra[BASE], trained, recipe.adapter, key=key)
    return union(trained, extra[FROZEN]) if recipe.trained is not None else trained


def _beside(recipe: Recipe, trained: Tree, seen: Tree) -> Mapping[str, Any]:
    """What the loss takes beside the parameters of the model."""
    base = seen.get(BASE)
    if recipe.head:
        return {"head": {name: trained[name] for name in recipe.head}}
    if not recipe.task.compares:
        return {}
    if recipe.pissa and recipe.adapter is not None:
        return {"reference": lora.bind(base, seen[START], recipe.adapter)}
    if recipe.quantized is not None and recipe.adapter is not None:
        return {"reference": lora.bind(base, {}, replace(recipe.adapter, targets=()))}
    return {"reference": base} if recipe.teacher is None else {"reference": base, "teacher": recipe.teacher}


def _narrow(recipe: Recipe, params: Tree) -> Tree:
    if recipe.base_dtype is None:
        return params
    return map_with_paths(lambda _, p: p.to(recipe.base_dtype) if p.is_floating_point() else p, params)


def optimizer(
    rate: optim.Schedule,
    *,
    clip: float,
    weight_decay: float,
    b1: float = 0.9,
    b2: float = 0.999,
    plus: float = 1.0,
    ema: float = 0.0,
) -> optim.Transform:
    """AdamW behind clipping by the global norm; matrices decay, vectors do not, and a step whose gradients are not
    finite changes nothing. `plus`: how much faster the `B` of an adapter learn (`lora.plus`). `ema`: the decay of a
    running average of what is trained, with warm-up; 0: none (`ftrain.run.averages`). Errors are those of the
    transforms.
    """

    def adamw(rate: Any) -> optim.Transform:
        return optim.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=_matrices)

    inner = adamw(rate) if plus == 1.0 else lora.plus(adamw, rate, ratio=plus)
    inner = optim.chain(inner, optim.ema(ema, warmup=True)) if ema else inner
    return optim.chain(optim.clip_by_global_norm(clip), optim.skip_nonfinite(inner))


def _matrices(params: Tree) -> Tree:
    return tree.map(lambda leaf: leaf.dim() >= 2, params)


def _fill(model: Model, params: Tree) -> None:
    _require_folder(model)
    assert model.load is not None
    model.load(params)


def _require_folder(model: Model) -> None:
    if model.load is None:
        raise ValueError(f"{model.name} has no folder to load weights from")


def _fill_quantized(model: Model, base: Tree, format: Literal["int8", "nf4"]) -> None:
    """Read the weights one after the other, and write them or their codes into a base, each rank its own parts."""
    if model.read is None:
        _require_folder(model)
        raise ValueError(f"{model.name} does not read its weights one by one, so it is not quantized while it is read")
    made = {path for path, _ in leaves_with_paths(base)}
    for path, spec in leaves_with_paths(model.specs):
        whole = model.read(path)
        if path in made:
            write(leaf(base, path), whole)
            continue
        codes = lora.quantize({"w": whole}, {"w": spec}, format, "w")["w"]
        for name, new in codes.items():
            write(leaf(base, f"{path}.{name}"), new)
