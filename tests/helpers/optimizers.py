"""Every optimizer, and a small problem with a matrix, a stack of matrices, a vector and a scalar."""

from typing import Any

import torch

from ftrain import optim, tree

SCHEDULE = optim.warmup_cosine(0.05, warmup_steps=3, total_steps=40, floor=0.005)


MATRICES = [("**.w", "matrix"), ("**", "rest")]


TRANSFORMS = {
    "adam": optim.adam(0.05),
    "masters": optim.master_weights(optim.adamw(0.05)),
    "in optax's words": optim.chain(
        optim.clip(1.0), optim.scale_by_adam(), optim.add_decayed_weights(1e-3), optim.scale_by_learning_rate(0.05)
    ),
    "adamw": optim.adamw(0.05),
    "adamw, scheduled": optim.adamw(SCHEDULE, mask=lambda p: tree.map(lambda x: x.ndim > 1, p)),
    "sgd": optim.sgd(0.05, weight_decay=0.01),
    "momentum": optim.sgd(SCHEDULE, momentum=0.9, nesterov=True),
    "lion": optim.lion(0.02, weight_decay=0.1),
    "lion, scheduled": optim.lion(SCHEDULE),
    "adafactor": optim.adafactor(0.05, weight_decay=0.01),
    "adafactor, scheduled": optim.adafactor(SCHEDULE),
    "muon": optim.multi_transform({"matrix": optim.muon(0.05), "rest": optim.adamw(0.05)}, MATRICES),
    "muon, scheduled": optim.multi_transform({"matrix": optim.muon(SCHEDULE), "rest": optim.freeze()}, MATRICES),
    "trace": optim.chain(optim.trace(0.9, nesterov=True), optim.add_decayed_weights(1e-3), optim.scale(-0.02)),
    "scale_by_schedule": optim.chain(optim.scale_by_schedule(SCHEDULE), optim.scale(-1.0)),
    "masked": optim.masked(
        optim.chain(optim.clip_by_value(1.0), optim.sgd(0.05)), lambda p: tree.map(lambda x: True, p), rest="pass"
    ),
    "whole recipe": optim.skip_nonfinite(
        optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(SCHEDULE), optim.ema(0.9, warmup=True)),
        max_consecutive=3,
    ),
}


def problem(dtype: torch.dtype) -> tuple[Any, tuple[torch.Tensor, torch.Tensor]]:
    """A small network with a matrix, a stack of matrices, a vector and a scalar, and the data of another one."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    params = {"up": {"w": normal(4, 8), "b": normal(8)}, "down": {"w": normal(2, 8, 3) / 3}, "scale": normal()}
    x_ND = normal(64, 4)

    return params, (x_ND, torch.tanh(x_ND @ normal(4, 8)) @ normal(2, 8, 3) / 3)


def loss(params: Any, x_ND: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    h_NF = torch.tanh(x_ND @ params["up"]["w"] + params["up"]["b"])
    return (params["scale"] * (h_NF @ params["down"]["w"]) - target).square().mean()
