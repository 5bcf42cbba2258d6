"""A short training of a small composition: Adam over named losses, and what every step's losses were."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import ftrain
from experiments.bench.table import Row, row
from ftrain import TrainState, optim
from ftrain.kernels.mean import Mean
from ftrain.modules.spec import Tree

_SHOWN = 50


@dataclass(frozen=True)
class Options:
    """What can be chosen."""

    steps: int = 400
    """updates"""
    batch: int = 16
    """talks of a step"""
    takes: int = 4
    """how often each trained voice says each number"""
    rate: float = 3e-3
    """peak learning rate"""
    threads: int = 1
    """CPU threads of each op"""
    seed: int = 0
    """of the clips, the weights and the order"""
    json: Path | None = None
    """also write the rows to this file"""


Curve = list[dict[str, float]]
"""The losses of every step, by name."""


def fit(
    specs: Tree,
    loss_terms: Callable[[Tree, Any], dict[str, Mean]],
    batch: Callable[[np.random.Generator], Any],
    *,
    options: Options,
    console: Console,
    weights: Mapping[str, float] | None = None,
) -> tuple[Tree, Curve]:
    """The trained parameters, and the curve. `batch`: makes one of random numbers; `weights` of terms, 1 where none."""
    rate = optim.warmup_cosine(options.rate, warmup_steps=min(30, options.steps // 5 + 1), total_steps=options.steps)
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(rate, weight_decay=0.02))

    def loss_fn(params: Tree, batch: Any) -> Any:
        terms = loss_terms(params, batch)
        return ftrain.weighted_sum(terms, weights or {}), {name: mean.value() for name, mean in terms.items()}

    @ftrain.jit(donate="state")
    def step(state: TrainState, batch: Any) -> Any:
        (_, terms), grads = ftrain.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        return state.apply(tx, grads), terms

    state = TrainState.create(ftrain.init(specs, ftrain.key(options.seed)), tx)
    rng, began, curve = np.random.default_rng(options.seed), time.monotonic(), Curve()
    for i in range(options.steps):
        state, terms = step(state, batch(rng))
        curve.append({name: float(value) for name, value in terms.items()})
        if i % _SHOWN == 0 or i == options.steps - 1:
            told = ", ".join(f"{name} {value:.3f}" for name, value in curve[-1].items())
            console.print(f"step {i}: {told}, {time.monotonic() - began:.0f} s", highlight=False)
    return state.params, curve


def loss_rows(curve: Curve) -> list[Row]:
    """A row for each loss, which should have halved."""
    rows, how = list[Row](), "mean of the first (peer) and the last ten steps"
    for term in curve[0]:
        first, last = (float(np.mean([step[term] for step in part])) for part in (curve[:10], curve[-10:]))
        rows.append(row(f"loss of what it {term}", last, "nats", goal=first / 2, peer=round(first, 4), how=how))
    return rows
