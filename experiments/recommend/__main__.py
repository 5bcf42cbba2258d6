"""Recommend films: one foundation for clicks, conversions and watch time, beside two towers trained in the same run.

python -m experiments.recommend [--steps N] [--json FILE]

Both read text, covers and categorical features of the same impressions, in the same order, and are judged on people
whom neither saw, by films of which a fifth are new.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console

import ftrain
from experiments.bench.table import Row, publish, row
from experiments.recommend import features, metrics, world
from experiments.recommend.features import Features
from experiments.recommend.foundation import Foundation
from experiments.recommend.towers import Towers
from ftrain import TrainState, optim
from ftrain.modules.families import recommender
from ftrain.modules.families.recommender import Predictions, Scores

_WEIGHTS = {"ctcvr": 3.0, "watch": 0.3}


@dataclass(frozen=True)
class Options:
    """What can be chosen."""

    steps: int = 940
    """updates of each model"""
    batch: int = 256
    """impressions of a step"""
    people: int = 12000
    """people to train on; as many, at most 1000, are held out"""
    rate: float = 3e-3
    """peak learning rate of the foundation"""
    towers_rate: float = 2e-3
    """peak learning rate of the two towers"""
    seed: int = 0
    """of the world, the models, and the order"""
    json: Path | None = None
    """also write the rows to this file"""


@dataclass(frozen=True)
class Side:
    """A model to train: its specs, its scores of a batch, and how a batch is made of chosen impressions."""

    name: str
    specs: Any
    scores: Callable[[Any, Any], Scores]
    batch: Callable[[Features, np.ndarray], Any]
    heads: recommender.RecommenderConfig
    rate: float


def main(options: Options) -> list[Row]:
    """Train both, judge both, print and write the rows."""
    console = Console(width=110)
    cfg = world.WorldConfig(people=options.people, held_out_people=min(1000, options.people), seed=options.seed)
    train, held_out = world.make(cfg)
    clicked_N, converted_N = train.seen.clicked_N, train.seen.converted_N
    rates = (float(clicked_N.mean()), float(converted_N[clicked_N].mean()))
    foundation, towers = Foundation(rates=rates), Towers(rates=rates)
    seen, judged = (
        features.of_split(split, tables=foundation.tables, vision=foundation.vision) for split in (train, held_out)
    )
    console.print(f"{len(train.seen)} impressions, {rates[0]:.1%} clicked, {rates[1]:.1%} of these bought")
    model, size = foundation.model, features.budget(seen, options.batch, model=foundation.model)
    sides = (
        Side(
            "foundation",
            foundation.specs(),
            foundation.scores,
            lambda of, chosen_N: features.packed(of, chosen_N, model=model, size=size),
            foundation.heads,
            options.rate,
        ),
        Side("two towers", towers.specs(), towers.scores, features.unpacked, towers.heads, options.towers_rate),
    )
    found = {side.name: judge(side, fit(side, seen, options, console), judged, options.batch) for side in sides}
    rows = _rows(found["foundation"], found["two towers"], options)
    publish(rows, "recommendation, held-out people", options.json)
    return rows


def fit(side: Side, seen: Features, options: Options, console: Console) -> Any:
    """The trained parameters of a side."""
    rate = optim.warmup_cosine(side.rate, warmup_steps=min(50, options.steps // 5 + 1), total_steps=options.steps)
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(rate, weight_decay=0.05))

    def loss_fn(params: Any, batch: Any) -> Any:
        terms = recommender.loss_terms(side.scores(params, batch), batch["labels"], cfg=side.heads)
        return ftrain.weighted_sum(terms, _WEIGHTS), {name: mean.value() for name, mean in terms.items()}

    @ftrain.jit(donate="state")
    def step(state: TrainState, batch: Any) -> Any:
        (_, terms), grads = ftrain.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        return state.apply(tx, grads), terms

    state, order = TrainState.create(ftrain.init(side.specs, ftrain.key(options.seed)), tx), _order(seen, options)
    began = time.monotonic()
    for i in range(options.steps):
        chosen_N = order[i * options.batch : (i + 1) * options.batch]
        state, terms = step(state, side.batch(seen, chosen_N))
        if i % 100 == 0 or i == options.steps - 1:
            told = ", ".join(f"{name} {float(value):.3f}" for name, value in terms.items())
            console.print(f"{side.name}: step {i}, {told}, {time.monotonic() - began:.0f} s", highlight=False)
    return state.params


def _order(seen: Features, options: Options) -> np.ndarray:
    """Which impressions come when: a new shuffle each epoch, the same for both sides."""
    need, rng = options.steps * options.batch, np.random.default_rng(options.seed)
    epochs = -(-need // len(seen.film_N))
    return np.concatenate([rng.permutation(len(seen.film_N)) for _ in range(epochs)])[:need]


def judge(side: Side, params: Any, judged: Features, size: int) -> dict[str, float]:
    """Every figure of a side on impressions of held-out people."""
    predict = ftrain.jit(lambda params, batch: recommender.predict(side.scores(params, batch), cfg=side.heads))
    count = len(judged.film_N) // size * size
    parts = [predict(params, side.batch(judged, np.arange(at, at + size))) for at in range(0, count, size)]
    found = Predictions(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))  # type: ignore[arg-type]
    return _figures(found, judged, count)


def _figures(found: Any, judged: Features, count: int) -> dict[str, float]:
    labels = {name: x_N[:count] for name, x_N in judged.labels.items()}
    clicked_N, converted_N, person_N = labels["clicked"], labels["converted"], judged.person_N[:count]
    new_N = judged.new_N[:count]
    return {
        "CTR AUC": metrics.auc(found.click_N, clicked_N),
        "CTR AUC, new films": metrics.auc(found.click_N[new_N], clicked_N[new_N]),
        "CTR GAUC": metrics.gauc(found.click_N, clicked_N, person_N),
        "CTR log loss": metrics.log_loss(found.click_N, clicked_N),
        "CTR calibration": metrics.calibration(found.click_N, clicked_N),
        "CVR AUC, of clicks": metrics.auc(found.convert_N[clicked_N], converted_N[clicked_N]),
        "CVR calibration, of clicks": metrics.calibration(found.convert_N[clicked_N], converted_N[clicked_N]),
        "CTCVR AUC": metrics.auc(found.both_N, converted_N),
        "CTCVR GAUC": metrics.gauc(found.both_N, converted_N, person_N),
        "CTCVR log loss": metrics.log_loss(found.both_N, converted_N),
        "CTCVR calibration": metrics.calibration(found.both_N, converted_N),
        "watch error": metrics.mean_error(found.watch_N[clicked_N], labels["watch_s"][clicked_N]),
        "watch calibration": metrics.calibration(found.watch_N[clicked_N], labels["watch_s"][clicked_N]),
    }


def _rows(ours: dict[str, float], theirs: dict[str, float], options: Options) -> list[Row]:
    """Ours with the towers' as the peer; errors and losses should be below theirs, areas above."""
    how = (
        f"{options.steps} steps of {options.batch} impressions each, the same for both; peer: two towers; AUC as the "
        "share of pairs in the wrong order, 1 - AUC, so that less is better"
    )
    rows = []
    for name, value in ours.items():
        other, unit = theirs[name], "s" if name == "watch error" else ""
        if "AUC" in name:
            rows.append(row(f"1 - {name}", 1 - value, unit, goal=1 - other, peer=1 - other, how=how))
        else:
            goal = None if "calibration" in name else other
            rows.append(row(name, value, unit, goal=goal, peer=other, how=how))
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options))
