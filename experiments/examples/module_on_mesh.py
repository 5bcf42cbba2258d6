"""A `torch.nn.Module` under test: its training on a mesh of four ranks in this process, beside one device.

    python -m experiments.examples.module_on_mesh

Put your module in the place of `Net`. Nothing in it knows of ranks.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import ftrain
from ftrain import Layout, Mean, Mesh, Plan, TrainState, optim
from ftrain.modules import spec


class Net(nn.Module):
    """Two layers with a gate between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(16, 64), nn.Linear(16, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, 16]` to `[rows, 4]`."""
        return self.down(torch.sigmoid(self.gate(x)) * self.up(x))


def trained(plan: Plan | None, steps: int) -> tuple[Any, list[float]]:
    """The parameters after so many steps, and the loss of each."""
    torch.manual_seed(0)
    module = Net().double()
    params = {name: leaf.detach().clone() for name, leaf in module.named_parameters()}
    tx = optim.adamw(1e-2)

    def loss_fn(params: Any, batch: Any) -> Mean:
        return Mean.of((functional_call(module, params, (batch["x"],)) - batch["y"]).square())

    def train_step(state: TrainState, batch: Any) -> Any:
        loss, grads = ftrain.value_and_grad(loss_fn)(state.params, batch)
        return state.apply(tx, grads), loss

    step = ftrain.jit(train_step, donate="state", plan=plan, specs=spec.of(params))
    state, losses = TrainState.create(params, tx), []
    for n in range(steps):
        random = torch.Generator().manual_seed(n)
        x = torch.randn(32, 16, generator=random, dtype=torch.float64)
        state, loss = step(state, {"x": x, "y": x[:, :4].sin()})
        losses.append(float(loss))
    return state.params, losses


def main(steps: int = 20) -> float:
    """Print both curves, and return by how much the parameters differ at most."""
    plan = Plan(Mesh(replicate=2, shard=2, kind="virtual"), Layout())
    (one, alone), (many, together) = trained(None, steps), trained(plan, steps)
    off = max(float((one[name] - many[name]).abs().max()) for name in one)
    for n in (0, steps // 2, steps - 1):
        print(f"step {n}: loss {alone[n]:.6f} on one device, {together[n]:.6f} on {plan.mesh}")
    print(f"the parameters differ by at most {off:.1e}")
    return off


if __name__ == "__main__":
    main()
