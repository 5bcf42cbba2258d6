"""How long each node of a step takes, with the parameter path and source line that it comes from."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from ftrain.analysis.op_times import OpTimes, op_key
from ftrain.graph.collectives import COLLECTIVES, WAIT
from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.text import op_name, short_source
from ftrain.graph.torch_private import keep_busy
from ftrain.kernels.offload import fetch_start, fetch_wait, offload_start, offload_wait
from ftrain.runtime.interpret import Iteration, interpret
from ftrain.step.api import Step, make_step

_COPIES = (offload_start, offload_wait, fetch_start, fetch_wait)
_INSIDE = 10  # runs of a short op between two events
_SHORT = 500.0  # microseconds above which an op is timed by a single run
_CYCLES_OF_LAUNCHES = 1_000_000  # about half a millisecond, in which the host launches _INSIDE ops

_Measure = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], tuple[Any, float]]
"""Runs an op on its arguments: its value, and its microseconds."""


class NodeTime(NamedTuple):
    """Time of one node of the graph, in microseconds per run of the step; of a node in a loop, the sum over all
    iterations.
    """

    name: str
    op: str
    path: str
    source: str
    microseconds: float
    phase: str


def profile_nodes(
    step: Step | Callable[..., Any], *args: Any, repeats: int = 3, remember: bool = False
) -> list[NodeTime]:
    """Time the ATen ops of a step one by one, in order of the graph: the least of `repeats` runs each, in microseconds.

    `step` is jitted or a plain function; `args` are as for a call of it, and are not modified. Nodes in the body of a
    loop are named `loop.node`. On CUDA a time is that of the device's work without its launch: the sum is above the
    time of a step that overlaps ops, and below that of a step that waits for launches. On a mesh of processes all ranks
    call this together, and the time of a wait is that of its message.

    `remember`: keep the time of each distinct op, shapes and dtypes for this device on disk (`FTRAIN_CACHE`). Steps
    that are lowered later weigh recompute and overlap by these times instead of by a roofline.

    ValueError for `repeats` below 1, and on a virtual or fake mesh, where no process runs a graph of its own.

    >>> import torch, ftrain
    >>> [(t.op, t.microseconds > 0) for t in ftrain.profile_nodes(lambda a: a @ a, torch.ones(64, 64), repeats=1)]
    [('mm', True)]
    """
    if repeats < 1:
        raise ValueError(f"profile_nodes: repeats must be at least 1, not {repeats}")
    step = step if isinstance(step, Step) else make_step(step)
    compiled, inputs = step.lower(*args), step.flat_inputs(*args)
    if remember:
        _remember(_least(compiled.graph, inputs, repeats), compiled.graph, compiled.setting.device)
    return list(_least(compiled.interpreted, inputs, repeats).values())


def _least(module: fx.GraphModule, inputs: list[torch.Tensor], repeats: int) -> dict[str, NodeTime]:
    """The least time of each node, after a warm-up run."""
    cuda = any(x.device.type == "cuda" for x in inputs)
    measure = _CudaClock() if cuda else _time_on_cpu
    _run_once(module, inputs, measure)
    runs = [_run_once(module, inputs, measure) for _ in range(repeats)]
    return {name: min((run[name] for run in runs), key=lambda t: t.microseconds) for name in runs[0]}


def _remember(found: dict[str, NodeTime], module: fx.GraphModule, device: torch.device) -> None:
    """Merge the times into the device's file. Collectives and waits are left out: their time is that of the other
    ranks.
    """
    by_key: dict[str, list[float]] = {}
    for name, node, rounds in _nodes(module):
        if name in found and node.target is not WAIT and node.target not in COLLECTIVES:
            by_key.setdefault(op_key(node), []).append(found[name].microseconds / rounds)
    times = OpTimes.on(device)
    times.measured.update({key: statistics.median(values) for key, values in by_key.items()})
    times.save()


def _nodes(module: fx.GraphModule, inside: str = "", rounds: int = 1) -> Iterator[tuple[str, fx.Node, int]]:
    """All nodes, those of loops by `loop.node`, with how often each runs."""
    for node in module.graph.nodes:
        yield inside + node.name, node, rounds
        if is_loop(node):
            yield from _nodes(loop_body(node), f"{inside}{node.name}.", rounds * max(1, int(node.args[1])))


def _run_once(module: fx.GraphModule, inputs: list[Any], measure: _Measure) -> dict[str, NodeTime]:
    total: dict[str, NodeTime] = {}

    def visit(node: fx.Node, inside: tuple[Iteration, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value, microseconds = measure(node, args, kwargs)
        name = ".".join([*(i.loop for i in inside), node.name])
        before = total[name].microseconds if name in total else 0.0
        meta = node.meta
        total[name] = NodeTime(
            name=name,
            op=op_name(node),
            path=meta.get("path") or "",
            source=short_source(meta.get("source")),
            microseconds=before + microseconds,
            phase=meta.get("phase", ""),
        )
        return value

    interpret(module, inputs, visit)
    return total


def _time_on_cpu(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, float]:
    start = time.perf_counter_ns()
    value = node.target(*args, **kwargs)  # type: ignore[operator]
    return value, (time.perf_counter_ns() - start) / 1e3


class _CudaClock:
    """Times the work of the device without the host's launches: these go on while the device is kept busy with empty
    cycles.

    A short op runs several times between two events, and the time of two events with nothing between them is
    subtracted.
    """

    def __init__(self) -> None:
        self._empty = 0.0
        self._empty = statistics.median(self._between(lambda: None) for _ in range(_INSIDE))

    def __call__(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, float]:
        """The op's value, and its microseconds."""
        found: list[Any] = []
        once = self._between(lambda: found.append(node.target(*args, **kwargs)))  # type: ignore[operator]
        if once > _SHORT or not _may_run_again(node):
            return found[0], once
        return found[0], self._between(lambda: _run(node, args, kwargs, _INSIDE)) / _INSIDE

    def _between(self, work: Callable[[], Any]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        keep_busy(_CYCLES_OF_LAUNCHES)
        start.record()
        work()
        end.record()
        end.synchronize()
        return max(0.0, start.elapsed_time(end) * 1e3 - self._empty)


def _run(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], times: int) -> None:
    for _ in range(times):
        node.target(*args, **kwargs)  # type: ignore[operator]


def _may_run_again(node: fx.Node) -> bool:
    """False for ops that write into their arguments, and for messages and copies to the host, which run once at a
    time.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return target is not WAIT and target not in COLLECTIVES and target not in _COPIES
