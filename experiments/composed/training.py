"""How a composition is trained: a loss for each kind of question, parts that may stay as they are, layouts by part."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from rich.console import Console
from torch import Tensor

import ftrain
from experiments.composed.documents import SHARES, Asker, Question, batch_of
from experiments.omni.batches import with_tasks
from experiments.omni.training import loss_weights, task_losses
from ftrain import TrainState, optim
from ftrain.kernels.mean import Mean
from ftrain.modules import moe
from ftrain.modules.budget import Budget
from ftrain.modules.mesh_packing import pack_for_mesh
from ftrain.modules.omni import OmniModel
from ftrain.modules.packing import exact_budget
from ftrain.modules.spec import Tree
from ftrain.sharding import Plan

KINDS = tuple(SHARES)
Frozen = Literal["foundation", "pictures", "sounds"]
"""What may stay as it begins, beside the tokenizer of pictures, which always does."""
_PATHS: Mapping[Frozen, str] = {
    "foundation": "foundation.**",
    "pictures": "encoders.image.tower.**",
    "sounds": "encoders.audio.tower.**",
}
_SHOWN = 50
_SAMPLED = 8
Curve = list[dict[str, float]]
"""The losses of every step, by kind."""


@dataclass(frozen=True)
class Training:
    """`steps` updates of `dozens` times twelve documents at the peak `rate`; `frozen`: parts that stay as they are."""

    steps: int
    dozens: int
    rate: float
    frozen: tuple[Frozen, ...] = ()
    seed: int = 0


def transform(cfg: Training) -> optim.Transform:
    """Muon on the matrices of layers, AdamW on all else that is trained; gradients of frozen parts are not computed."""
    warmup = min(40, cfg.steps // 5 + 1)
    rate = optim.warmup_cosine(cfg.rate, warmup_steps=warmup, total_steps=cfg.steps, floor=cfg.rate / 50)
    groups = {
        "matrices": optim.chain(
            optim.clip_by_global_norm(5.0), optim.muon(rate, weight_decay=0.05, adjust="match_rms_adamw", ns_dtype=None)
        ),
        "others": optim.chain(optim.clip_by_global_norm(5.0), optim.adamw(rate, b2=0.98, weight_decay=0.0)),
        "frozen": optim.freeze(),
    }
    frozen = [(path, "frozen") for path in ("decoders.*.tokenizer.**", *(_PATHS[name] for name in cfg.frozen))]
    return optim.multi_transform(groups, [*frozen, ("**.layers.*.**.w_*", "matrices"), ("**", "others")])


def train_step(
    model: OmniModel, tx: optim.Transform
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Tensor]]]:
    """The pure step `(state, batch) -> (state, losses by kind)`; experts are kept even by a loss."""
    weights = {**loss_weights(KINDS), "balance": 0.0 if model.foundation.moe is None else 0.01}

    def loss_fn(params: Tree, batch: Any) -> Any:
        terms = losses(params, batch, model)
        return ftrain.weighted_sum(terms, weights), {name: mean.value() for name, mean in terms.items()}

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Tensor]]:
        (_, terms), grads = ftrain.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        return state.apply(tx, grads), terms

    return step


def losses(params: Tree, batch: Any, model: OmniModel) -> dict[str, Mean]:
    """The loss of each kind of question, and with experts `balance`."""
    terms, stats = task_losses(params, batch, model=model, balance=None, tasks=KINDS)
    return terms if stats.router is None else {**terms, "balance": moe.aux_loss(stats.router)}


def budget_of(asker: Asker, dozens: int) -> Budget:
    """A budget that a step's documents fit, mostly; it grows for those that do not (`pack_for_mesh`)."""
    rng, model = np.random.default_rng(0), asker.to.model
    found = [exact_budget([one.whole for one in batch_of(asker, rng, dozens)], model=model) for _ in range(_SAMPLED)]
    return Budget(
        tokens=max(one.tokens for one in found),
        rows={name: max(one.rows[name] for one in found) for name in model.encoders},
        targets={name: max(one.targets[name] for one in found) for name in model.decoders},
    )


def packed(asked: Sequence[Question], model: OmniModel, budget: Budget, *, packs: int = 1, parts: int = 1) -> Any:
    """The batch of these questions, in packs for each data rank and parts for each rank that shares one."""
    made = pack_for_mesh([one.whole for one in asked], budget=budget, model=model, packs=packs, parts=parts)
    return with_tasks(made.batch, [KINDS.index(asked[i].kind) for i in made.taken])


def fit(params: Tree, asker: Asker, cfg: Training, console: Console, *, plan: Plan | None = None) -> tuple[Tree, Curve]:
    """The trained parameters, and the losses of every step."""
    model, tx = asker.to.model, transform(cfg)
    step = ftrain.jit(train_step(model, tx), donate="state", plan=plan)
    state, budget = TrainState.create(params, tx), budget_of(asker, cfg.dozens)
    rng, began, curve = np.random.default_rng(cfg.seed), time.monotonic(), Curve()
    for i in range(cfg.steps):
        state, terms = step(state, packed(batch_of(asker, rng, cfg.dozens), model, budget))
        curve.append({name: float(value) for name, value in terms.items()})
        if i % _SHOWN == 0 or i == cfg.steps - 1:
            told = ", ".join(f"{name} {value:.3f}" for name, value in curve[-1].items())
            console.print(f"step {i}: {told}, {time.monotonic() - began:.0f} s", highlight=False)
    return state.params, curve
