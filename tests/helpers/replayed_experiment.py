"""A small experiment whose steps can be replayed: two layers, on one device or a mesh, with batches by position."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import ftrain
from ftrain import optim
from ftrain.checkpoint import Checkpointer, Ranks
from ftrain.kernels.mean import Mean
from ftrain.modules import spec
from ftrain.modules.spec import Normal, ParamSpec
from ftrain.resilience.replay import Replayable
from ftrain.resilience.skipped import read_skipped
from ftrain.sharding import Mesh, Plan

SPECS = {
    "up": ParamSpec((8, 16), ("embed", "mlp"), Normal(0.3)),
    "scale": ParamSpec((16,), ("mlp",), Normal(0.3)),
    "down": ParamSpec((16, 8), ("mlp", "embed"), Normal(0.3)),
}
TX = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2))


def train_step(state, batch):
    def loss_fn(params, batch):
        hidden = torch.log1p((batch["x_TD"] @ params["up"]).square()) * params["scale"]
        error = hidden @ params["down"] - batch["y_TD"]
        return Mean(error.square().sum(), torch.ones_like(error).sum())

    loss, grads = ftrain.value_and_grad(loss_fn)(state.params, batch)
    updated = state.apply(TX, grads)
    return updated, {"loss": loss, "grad_norm": updated.opt_state[0].norm}


def batch_at(position: int) -> dict[str, torch.Tensor]:
    numbers = torch.Generator().manual_seed(position)
    return {name: torch.randn(12, 8, generator=numbers) for name in ("x_TD", "y_TD")}


def made_of(mesh: Mesh | None) -> Replayable:
    step = ftrain.jit(train_step, donate="state", plan=None if mesh is None else Plan(mesh), specs=SPECS)
    return Replayable(
        step=step,
        abstract_state=ftrain.TrainState.create(spec.abstract(SPECS), TX),
        fresh_state=lambda: step.init(lambda k: ftrain.TrainState.create(ftrain.init(SPECS, k), TX), ftrain.key(5)),
        batch_at=batch_at,
        device=torch.device("cpu"),
    )


def replayable(config: Mapping[str, Any]) -> Replayable:
    sizes = config["mesh"]
    return made_of(None if sizes is None else Mesh(*sizes, kind="virtual"))


def train(run: Path, *, steps: int = 6, every: int = 2, mesh: Mesh | None = None, rank: int = 0) -> None:
    """A run of so many steps, with checkpoints; on a mesh of processes each calls this."""
    made, skipped = made_of(mesh), read_skipped(run)
    ranks = Ranks.of_run() if mesh is not None and mesh.kind == "process" else None
    sizes = None if mesh is None else [mesh.replicate, mesh.shard, mesh.sequence]
    if rank == 0:
        run.mkdir(exist_ok=True)
        (run / "config.json").write_text(json.dumps({"mesh": sizes, "replay": __name__}))
    state = made.fresh_state()
    rows = []
    with Checkpointer(run / "checkpoints", ranks=ranks) as checkpoints:
        for step in range(1, steps + 1):
            state, metrics = made.step(state, made.step.share(batch_at(skipped.position(step))))
            rows.append({"step": step, **{name: float(value) for name, value in metrics.items()}})
            if step % every == 0:
                checkpoints.save(state, step)
    if rank == 0:
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
