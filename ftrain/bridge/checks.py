"""`check`: a model against the module that it was made of, in numbers: what to run first on a model of one's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftrain.bridge.plain import widened
from ftrain.bridge.skeleton import flatten
from ftrain.kernels import random
from ftrain.modules.model import Model
from ftrain.modules.spec import Tree, init
from ftrain.plan.jit import jit
from ftrain.sharding.plan import Plan
from ftrain.trace.grad import value_and_grad

_NEARLY_ZERO = (
    1e-4  # of the largest gradient: below it gradients are compared with that (keys' biases, whose true one is 0)
)


@dataclass(frozen=True)
class Row:
    """One number that was compared: what of, the distance, and whether it is within the tolerance.

    `apart`: of a loss the absolute distance; of a gradient that of its norm to the plain one's.
    """

    name: str
    apart: float
    equal: bool


@dataclass(frozen=True)
class Checked:
    """What `check` found: the loss first, then every parameter's gradient, the farthest first."""

    model: str
    where: str
    rows: tuple[Row, ...]

    @property
    def equal(self) -> bool:
        """True if all is within the tolerance."""
        return all(row.equal for row in self.rows)

    def __str__(self) -> str:
        shown = [*self.rows[:1], *sorted(self.rows[1:], key=lambda row: -row.apart)[:10]]
        width = max(len(row.name) for row in shown)
        lines = [f"{self.model}, {self.where}: {'equal' if self.equal else 'NOT equal'}"]
        lines += [
            f"  {row.name:<{width}}  {row.apart:9.1e}  {'' if row.equal else 'differs'}".rstrip() for row in shown
        ]
        left = len(self.rows) - len(shown)
        return "\n".join([*lines, *([f"  and {left} more, all nearer"] if left else [])])


def check(
    model: Model,
    batch: Mapping[str, Any],
    *,
    params: Tree | None = None,
    plan: Plan | None = None,
    tolerance: float = 1e-5,
) -> Checked:
    """Compare the loss and every gradient of a model, jitted, with those of the plain module in float64.

    - `batch`: with labels. `params`: numbers to compare at; those of the folder if there is one, else new ones.
    - `plan`: to compare on a mesh, most often a virtual one: `Plan(Mesh(shard=2, sequence=2, kind="virtual"))`.
    - `tolerance`: of the loss, and of each gradient relative to its norm.

    Nothing is dropped, as without a key; floating leaves of the batch are made float64. ValueError for a model that
    has no plain form: a native one, and a module without a loss.

    >>> import torch
    >>> from ftrain.bridge import check, from_transformers
    >>> from transformers import LlamaConfig
    >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model = from_transformers(LlamaConfig(vocab_size=11, **sizes))
    >>> batch = {"tokens": torch.arange(8), "labels": torch.arange(1, 9), "segments": torch.arange(8) // 4}
    >>> check(model, batch).equal
    True
    """
    if model.plain is None:
        raise ValueError(f"{model.name} has no plain module that it could be compared with")
    if params is None:
        params = model.load() if model.load is not None else init(model.specs, random.key(0))
    loss, grads = model.plain(params, batch)

    def step(params: Tree, batch: Mapping[str, Any], state: Tree) -> tuple[Tensor, Tree]:
        return value_and_grad(lambda p, b: _loss(model, p, b, state))(params, batch)

    jitted = jit(step) if plan is None else jit(step, plan=plan, specs=model.specs)
    found, of_model = jitted(widened(params), widened(dict(batch)), widened(model.state))
    where = "one device" if plan is None else str(plan.mesh)
    apart = abs(float(found) - float(loss))
    rows = [Row("loss", apart, apart <= tolerance)]
    floor = _NEARLY_ZERO * max(float(g.norm()) for g in grads.values())
    for name, grad in flatten(of_model).items():
        far = _apart(grad, grads[name], floor)
        rows.append(Row(name, far, far <= tolerance))
    return Checked(model.name, where, tuple(rows))


def _loss(model: Model, params: Tree, batch: Mapping[str, Any], state: Tree) -> Any:
    """The loss without the new state of a model that has one."""
    return model.loss(params, batch, state=state)[0] if state else model.loss(params, batch)


def _apart(found: Tensor, expected: Tensor, floor: float) -> float:
    return float((found.double() - expected.double()).norm()) / max(float(expected.norm()), floor, torch.finfo().tiny)
