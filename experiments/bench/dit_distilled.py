"""What does an iteration of distribution matching cost, in forward passes of the model?

Counted in FLOPs of traced steps of a small Wan on shapes alone: the critic learns in each iteration, the student in
every fifth, from samples of four steps of which the number that is run is drawn (2.5 in the mean), and the teacher is
guided. Layers are recomputed, as they are where such models are trained.
"""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import ftrain
from experiments.bench.table import Row, row
from ftrain import Aval
from ftrain.bridge.native_wan import NativeWan
from ftrain.modules.families import wan
from ftrain.modules.families.wan_config import DIFFUSERS, WanConfig, config
from ftrain.modules.velocity import Velocity, guided
from ftrain.tasks.distill import Dmd
from ftrain.tasks.distill.rollout import rollout

TIMES = (1.0, 0.9375, 0.8333, 0.625, 0.0)
EVERY = 5
"""The student learns once for so many updates of its critic."""
_GOAL, _OTHERS = 8.2, 10.0
_CPU = torch.device("cpu")


def iteration(*, quick: bool = False) -> Row:
    """An iteration's FLOPs over those of a forward pass."""
    layers, side = (2, 8) if quick else (8, 48)
    told = {"num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 4096, "num_layers": layers}
    cfg = config({"_class_name": DIFFUSERS, **told})
    params = ftrain.tree.map(lambda s: Aval(s.shape, s.dtype, _CPU), wan.specs(cfg))
    batch = _batch(cfg, side * side)
    key = Aval((2,), torch.int64, _CPU)
    once = _flops(lambda params, batch, key: _field(cfg, params, batch)(batch["x"], _ones(batch)), params, batch, key)
    student, critic = (
        statistics.mean(_flops(made(cfg, exit), params, batch, key) for exit in range(len(TIMES) - 1))
        for made in (_student_step, _critic_step)
    )
    how = (
        f"FLOPs of traced steps on shapes alone: {layers} blocks of width {cfg.d_model}, {side * side} patches; a "
        f"critic's update {critic / once:.2f}, a student's {student / once:.2f} and once for {EVERY}, 4 steps of which "
        "2.5 are run in the mean, guidance in two calls, layers recomputed; peer: all steps are run, then one is chosen"
    )
    cost = (critic + student / EVERY) / once
    return row("distribution matching: forward passes of an iteration", cost, "", goal=_GOAL, peer=_OTHERS, how=how)


def _flops(function: Callable[..., Any], *args: Any) -> float:
    return float(ftrain.jit(function, remat="layer").lower(*args).cost().flops)


def _batch(cfg: WanConfig, rows: int) -> dict[str, Aval]:
    wide = {"x": (rows, cfg.row_in), "text": (cfg.text_rows, cfg.d_text), "without": (cfg.text_rows, cfg.d_text)}
    made = {name: Aval(shape, torch.float32, _CPU) for name, shape in wide.items()}
    return {**made, "positions": Aval((rows, 3), torch.int64, _CPU), "ids": Aval((rows,), torch.int64, _CPU)}


def _ones(batch: Mapping[str, Tensor]) -> Tensor:
    return torch.ones(len(batch["x"]), device=batch["x"].device)


def _field(cfg: WanConfig, params: Any, batch: Mapping[str, Tensor], text: str = "text") -> Velocity:
    """The model as a velocity field of one clip, whose rows have one time."""
    model = NativeWan(cfg)

    def velocity(x_NP: Tensor, time_N: Tensor) -> Tensor:
        leaves = {"latents": x_NP, "times": time_N[:1], "positions": batch["positions"], "text": batch[text]}
        return model.outputs(params, leaves)

    return velocity


def _made(cfg: WanConfig, exit: int, params: Any, batch: Mapping[str, Tensor], key: Tensor) -> Tensor:
    return rollout(_field(cfg, params, batch), batch["x"], TIMES, key=key, exit=exit)


def _critic_step(cfg: WanConfig, exit: int) -> Callable[..., Any]:
    def step(params: Any, batch: Mapping[str, Tensor], key: Tensor) -> Any:
        with torch.no_grad():
            made = _made(cfg, exit, params, batch, key)
        loss = lambda own, batch: Dmd().critic_loss(_field(cfg, own, batch), made, ids_N=batch["ids"], key=key)  # noqa: E731
        return ftrain.value_and_grad(loss)(params, batch)

    return step


def _student_step(cfg: WanConfig, exit: int) -> Callable[..., Any]:
    def step(params: Any, batch: Mapping[str, Tensor], key: Tensor) -> Any:
        def loss(own: Any, batch: Mapping[str, Tensor]) -> Any:
            teacher = guided(_field(cfg, params, batch), _field(cfg, params, batch, "without"), 5.0)
            made = _made(cfg, exit, own, batch, key)
            return Dmd().loss(made, teacher, _field(cfg, params, batch), ids_N=batch["ids"], key=key)

        return ftrain.value_and_grad(loss)(params, batch)

    return step
