"""A network of three layers on scikit-learn's handwritten digits: parameters, a loss, a step, a table of accuracy.

python -m experiments.examples.mlp [--steps 300]
"""

from dataclasses import dataclass
from typing import Any

import torch
import tyro
from sklearn.datasets import load_digits
from torch import Tensor

import ftrain
from ftrain import Mean, TrainState, optim

SIZES = (64, 128, 128, 10)


@dataclass(frozen=True)
class Options:
    """What to run."""

    steps: int = 300
    rows: int = 128
    seed: int = 0


def init(key: Tensor) -> Any:
    """A list of layers, each with weights `[in, out]` and a bias."""
    keys = ftrain.split(key, len(SIZES) - 1)
    return [
        {"w": ftrain.normal(k, (a, b)) * (2 / a) ** 0.5, "b": torch.zeros(b)}
        for k, a, b in zip(keys, SIZES, SIZES[1:], strict=False)
    ]


def scores(params: Any, x: Tensor) -> Tensor:
    """`[rows, 64]` pixels to `[rows, 10]` scores."""
    for layer in params[:-1]:
        x = torch.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def loss_fn(params: Any, batch: Any) -> Mean:
    """The mean cross entropy, as a sum and a count: so it is right over micro-batches and meshes too."""
    return Mean.of(torch.nn.functional.cross_entropy(scores(params, batch["x"]), batch["y"], reduction="none"))


def main(options: Options) -> float:
    """Train, print a line now and then, and return the accuracy on digits that were not trained on."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    tx = optim.adamw(optim.warmup_cosine(3e-3, warmup_steps=20, total_steps=options.steps))

    def train_step(state: TrainState, batch: Any) -> Any:
        loss, grads = ftrain.value_and_grad(loss_fn)(state.params, batch)
        return state.apply(tx, grads), {"loss": loss}

    step = ftrain.jit(train_step, donate="state")
    state = TrainState.create(init(ftrain.key(options.seed)), tx)
    random = torch.Generator().manual_seed(options.seed)
    for n in range(1, options.steps + 1):
        rows = torch.randint(0, 1500, (options.rows,), generator=random)
        state, metrics = step(state, {"x": x[rows], "y": y[rows]})
        if n % 100 == 0:
            print(f"step {n}: loss {float(metrics['loss']):.4f}")
    right = scores(state.params, x[1500:]).argmax(-1) == y[1500:]
    print(f"accuracy on {len(right)} digits that were not trained on: {right.float().mean():.1%}")
    return float(right.float().mean())


if __name__ == "__main__":
    main(tyro.cli(Options))
