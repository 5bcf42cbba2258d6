"""One script, alone and on many ranks: it goes on from its last checkpoint, on as many ranks as there are then.

python -m experiments.examples.on_many_ranks RUN STEPS
torchrun --nproc-per-node 2 -m experiments.examples.on_many_ranks RUN STEPS
"""

import sys
from pathlib import Path
from typing import Any

import torch

import ftrain
from ftrain import Mean, TrainState, optim
from ftrain.checkpoint import Retention
from ftrain.modules.spec import Normal, ParamSpec

SPECS = {
    "up": ParamSpec((16, 64), ("embed", "mlp"), Normal(0.2)),
    "down": ParamSpec((64, 4), ("mlp", "embed"), Normal(0.1)),
}
TX = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2))


def loss_fn(params: Any, batch: Any) -> Mean:
    """Squared error of two layers; `batch`: x `[rows, 16]`, y `[rows, 4]`."""
    return Mean.of((torch.relu(batch["x"] @ params["up"]) @ params["down"] - batch["y"]).square())


def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
    """Two micro-batches of the rank's share, one update."""
    loss, grads = ftrain.value_and_grad(ftrain.accumulate(loss_fn, 2))(state.params, batch)
    return state.apply(TX, grads), loss


def batch_at(number: int) -> dict[str, torch.Tensor]:
    """The whole batch of a step, the same however many ranks share it."""
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(number))
    return {"x": x, "y": x[:, :4].sin()}


def main(folder: Path, steps: int) -> None:
    """Train to so many steps, from where the folder's run stands."""
    with ftrain.run.session() as run:
        step = ftrain.jit(train_step, plan=run.plan(), specs=SPECS, donate="state")
        state = step.init(lambda key: TrainState.create(ftrain.init(SPECS, key), TX), ftrain.key(0).to(run.device))
        checkpoints = run.checkpointer(folder, keep=Retention(last=2), specs=SPECS)
        done = checkpoints.latest() or 0
        if done:
            state = checkpoints.restore(state, done)
        for n in run.steps(done, steps):
            state, loss = step(state, run.share(batch_at(n)))
            run.print(f"step {n} on {run.mesh.size} ranks: loss {float(loss):.6f}")
            if n % 50 == 0 or run.is_last:
                checkpoints.save(state, n)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
