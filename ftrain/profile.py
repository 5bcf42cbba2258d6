"""How long each node of a step takes, with the parameter path and source line it came from."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from ftrain import tree
from ftrain.compiled import Compiled
from ftrain.debug import private_inputs
from ftrain.interpret import Iteration, interpret
from ftrain.text import op_name, short_site
from ftrain.trace import is_array


class NodeTime(NamedTuple):
    """Time of one node of the graph, in microseconds per run; of a node in a loop, all rounds together."""

    name: str
    op: str
    path: str
    site: str
    microseconds: float
    phase: str


def profile_nodes(compiled: Compiled, *args: Any, repeats: int = 3) -> list[NodeTime]:
    """Time the ATen ops of a lowered step one by one, in order of the graph: the least of `repeats` runs each.

    `compiled` is `step.lower(*args)`; the arguments are not modified. Nodes in the body of a loop are named
    `loop.node`. Each op waits for the device (CUDA events), so the sum is above the time of a step that overlaps them.
    """
    if repeats < 1:
        raise ValueError(f"profile_nodes: repeats must be at least 1, not {repeats}")
    leaves = private_inputs(compiled, [leaf for leaf in tree.leaves(args) if is_array(leaf)])
    cuda = any(leaf.device.type == "cuda" for leaf in leaves)
    measure = _time_on_cuda if cuda else _time_on_cpu
    best: dict[str, NodeTime] = {}
    for round_ in range(repeats + 1):
        once = _run_once(compiled.executed, leaves, measure)
        if round_ == 1:  # round 0 warms up
            best = once
        elif round_ > 1:
            best = {k: min(v, once[k], key=lambda t: t.microseconds) for k, v in best.items()}
    return list(best.values())


def _run_once(module: fx.GraphModule, inputs: list[Any], measure: Callable) -> dict[str, NodeTime]:
    total: dict[str, NodeTime] = {}

    def visit(node: fx.Node, inside: tuple[Iteration, ...], args: tuple, kwargs: dict[str, Any]) -> Any:
        value, microseconds = measure(node.target, args, kwargs)
        name = ".".join([*(i.loop for i in inside), node.name])
        before = total[name].microseconds if name in total else 0.0
        meta = node.meta
        total[name] = NodeTime(
            name=name,
            op=op_name(node),
            path=meta.get("path") or "",
            site=short_site(meta.get("site")),
            microseconds=before + microseconds,
            phase=meta.get("phase", ""),
        )
        return value

    interpret(module, inputs, visit)
    return total


def _time_on_cpu(function: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, float]:
    start = time.perf_counter_ns()
    value = function(*args, **kwargs)
    return value, (time.perf_counter_ns() - start) / 1e3


def _time_on_cuda(function: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, float]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    value = function(*args, **kwargs)
    end.record()
    end.synchronize()
    return value, start.elapsed_time(end) * 1e3
