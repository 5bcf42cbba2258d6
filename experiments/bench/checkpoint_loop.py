"""A training loop for the bench of checkpoints: real compute on the state that is saved, and what a save costs it."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ftrain
from ftrain import tree
from ftrain.kernels.mean import Mean
from ftrain.modules.spec import Normal, ParamSpec
from ftrain.sharding import Plan
from ftrain.sharding.mesh import Mesh

TOKENS, STEPS = 16, 3


class Loop:
    """A few steps of a residual stack with two moments per parameter; the step donates the state."""

    def __init__(self, state: Any, mesh: Mesh) -> None:
        """`state`: `params`, `opt_state` of `mu` and `nu`, `step`; on a mesh of several ranks DTensors."""
        self.state = state
        self._mesh = mesh
        specs = {name: ParamSpec(tuple(p.shape), ("embed", "mlp"), Normal(1.0)) for name, p in state["params"].items()}
        plan = None if mesh.size == 1 else Plan(mesh)
        self._step = ftrain.jit(_step, donate="state", plan=plan, specs=specs)
        width = next(iter(specs.values())).shape[1]
        numbers = torch.Generator().manual_seed(0)
        self._batch = self._step.share({"x": torch.randn(TOKENS * mesh.size, width, generator=numbers)})

    def run(self, begin: Callable[[Any], None]) -> float:
        """Seconds of `begin(state)` and the steps after it, on one core: on more a step's time is that of the slowest,
        and on a shared machine that is chance.
        """
        threads = torch.get_num_threads()
        began = time.perf_counter()
        begin(self.state)
        torch.set_num_threads(1)
        for _ in range(STEPS):
            self.state, _ = self._step(self.state, self._batch)
        took = time.perf_counter() - began
        torch.set_num_threads(threads)
        return took


def _loss(params: Any, batch: Any) -> Mean:
    x_TD = batch["x"]
    for w_FD in params.values():
        x_TD = x_TD + torch.tanh(x_TD @ w_FD.T) @ w_FD
    return Mean.of(x_TD.square())


def _step(state: Any, batch: Any) -> tuple[Any, Tensor]:
    loss, grads = ftrain.value_and_grad(_loss)(state["params"], batch)
    mu = tree.map(lambda m, g: 0.9 * m + 0.1 * g, state["opt_state"]["mu"], grads)
    nu = tree.map(lambda n, g: 0.99 * n + 0.01 * g * g, state["opt_state"]["nu"], grads)
    params = tree.map(lambda p, m, n: p - 1e-6 * m / (n.abs().sqrt() + 1), state["params"], mu, nu)
    return {"params": params, "opt_state": {"mu": mu, "nu": nu}, "step": state["step"] + 1}, loss
