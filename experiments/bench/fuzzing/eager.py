"""A program's calls by plain eager PyTorch: what is right."""

from typing import Any

import torch
from torch import Tensor

from experiments.bench.fuzzing.plain import plain_accumulate, plain_value_and_grad
from experiments.bench.fuzzing.program import Program
from experiments.bench.fuzzing.source import load
from ftrain import tree

Call = tuple[Any, Any]


def run_eagerly(program: Program, *, nudge: float = 0.0) -> list[Call]:
    """State and metrics after each call, by plain PyTorch; `nudge`: a relative change of all floating inputs."""
    names = load(program)
    options = program.options
    compute = getattr(torch, options.precision) if options.precision else None
    names.update(value_and_grad=plain_value_and_grad(compute), accumulate=plain_accumulate)
    state, calls = _nudged(names["make_state"](), nudge), list[Call]()
    for rows in options.rows:
        torch.manual_seed(0)
        batch = _nudged(names["make_batch"](rows), nudge)
        state, metrics = names["step"](state, batch)
        calls.append((snapshot(state), snapshot(metrics)))
        _require_finite(calls[-1])
    return calls


def _nudged(values: Any, by: float) -> Any:
    if not by:
        return values
    seen: dict[int, Tensor] = {}

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return seen.setdefault(id(x), x * (1 + by))

    return tree.map(move, values)


def snapshot(values: Any) -> Any:
    return tree.map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, values)


def _require_finite(call: Call) -> None:
    for leaf in tree.leaves(call):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(leaf.abs().max() < 1e6):
            raise ValueError("numbers grow without bound")
