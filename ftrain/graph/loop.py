"""A loop that a trace holds once: `carry = body(carry, xs[i], consts)` for every `i`.

The graph of the body is traced one time and called `n` times, so the graph of a step does not grow with the number of
micro-batches. The loop itself is never differentiated: a body takes its own gradients.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, fx

from ftrain.graph.source import user_source
from ftrain.graph.torch_private import (
    FakeTensor,
    emit_node,
    is_tracked,
    lazy_module,
    new_fake_like,
    paused_trace,
    snapshot,
    trace_to_graph,
    tracing_graph,
)

_PREVIEW = "preview"


def run_loop(
    body: Callable[..., Iterable[Tensor]],
    n: int,
    carry: list[Tensor],
    xs: list[Tensor],
    consts: list[Tensor],
    *,
    copy: list[bool] | None = None,
) -> list[Tensor]:
    """Run `carry = body(*carry, *(x[i] for x in xs), *consts)` for `i` in `range(n)` and return the last carry.

    The body may write its results into the carry it is given (see the donate pass), so the first one is a copy; `copy`
    says of which leaves (all of them by default).
    """
    carry = [c.clone() if must else c for c, must in zip(carry, copy or [True] * len(carry), strict=True)]
    for i in range(n):
        carry = list(body(*carry, *[x[i] for x in xs], *consts))
    return carry


def loop(
    body: Callable[..., Iterable[Tensor]],
    n: int,
    *,
    carry: list[Tensor],
    xs: list[Tensor],
    consts: list[Tensor],
    preview: bool = False,
) -> list[Tensor]:
    """Like `run_loop`; under a trace it becomes one node that holds the body's graph.

    - `xs`: have a leading dim of `n`. `carry`: keeps its shapes and dtypes.
    - `consts`: the same in every round. Tensors of the enclosing trace that the body closes over become further consts.
    - `preview`: the loop runs a part of the step ahead of it, and leaves torch's generators as they are (under a trace:
      see `ftrain.trace.preview`).

    ValueError under a trace for a carry of another shape or dtype, and for a body that closes over a tensor which is
    not part of the trace.

    >>> import torch
    >>> from ftrain.graph.loop import loop
    >>> loop(lambda total, x: [total + x], 3, carry=[torch.zeros(())], xs=[torch.tensor([1.0, 2.0, 4.0])], consts=[])
    [tensor(7.)]
    """
    if tracing_graph() is None:
        with _generators_as_found([*carry, *xs, *consts]) if preview else nullcontext():
            return run_loop(body, n, carry, xs, consts)
    with paused_trace():
        fakes = [new_fake_like(t) for t in carry] + [new_fake_like(x[0]) for x in xs]
        fakes += [new_fake_like(t) for t in consts]
    graph = trace_to_graph(body, fakes)
    _check_carry(graph, carry)
    captured = _lift_captured(graph)
    with paused_trace():
        outputs = [new_fake_like(t) for t in carry]
    meta = {"phase": "loop", "body": graph, "source": user_source(), _PREVIEW: preview}
    return emit_node(run_loop, graph, "loop", (n, list(carry), list(xs), [*consts, *captured]), outputs, meta)


def _generators_as_found(tensors: list[Tensor]) -> AbstractContextManager[None]:
    cards = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    return torch.random.fork_rng(cards)


def _check_carry(graph: fx.GraphModule, carry: list[Tensor]) -> None:
    results = graph.graph.output_node().args[0]
    for i, (node, before) in enumerate(zip(results, carry, strict=True)):  # type: ignore[arg-type]
        after = node.meta["val"]
        if after.shape != before.shape or after.dtype != before.dtype:
            raise ValueError(
                f"a loop's carry must keep its shape and dtype: leaf {i} goes in as {tuple(before.shape)} "
                f"{before.dtype} and comes out as {tuple(after.shape)} {after.dtype}"
            )


def _lift_captured(module: fx.GraphModule) -> list[Tensor]:
    """Turn fake tensors that the body closed over into further placeholders; return them in that order."""
    graph = module.graph
    values = {str(n.target): getattr(module, str(n.target)) for n in graph.nodes if n.op == "get_attr"}
    captured = {name: value for name, value in values.items() if isinstance(value, FakeTensor)}
    last_placeholder = [n for n in graph.nodes if n.op == "placeholder"][-1]
    for i, (name, value) in enumerate(captured.items()):
        if not is_tracked(value):
            raise ValueError("a loop's body closes over a tensor that is not part of the step: pass it as an argument")
        reads = [n for n in graph.nodes if n.op == "get_attr" and n.target == name]
        with graph.inserting_after(last_placeholder):
            last_placeholder = graph.placeholder(f"captured_{i}")
        last_placeholder.meta.update(reads[0].meta, val=snapshot(value))
        for node in reads:
            node.replace_all_uses_with(last_placeholder)
            graph.erase_node(node)
        delattr(module, name)
    module.recompile()
    return list(captured.values())


def is_loop(node: fx.Node) -> bool:
    """True for the node of a loop."""
    return node.op == "call_function" and node.target is run_loop


def is_preview(node: fx.Node) -> bool:
    """True for the node of a loop that runs a part of the step ahead of it."""
    return is_loop(node) and bool(node.meta.get(_PREVIEW))


def loop_body(node: fx.Node) -> fx.GraphModule:
    """The graph of a loop node's body."""
    owner = node.graph.owning_module
    body = getattr(owner, node.args[0].target)  # type: ignore[union-attr,arg-type]
    assert isinstance(body, fx.GraphModule)
    return body


def with_bodies(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graphs that a run of this one goes through: the bodies of its loops, innermost first, and itself at last."""
    for node in list(module.graph.nodes):
        if is_loop(node):
            yield from with_bodies(loop_body(node))
    yield module


def carried_outputs(node: fx.Node) -> dict[str, int]:
    """The names of the placeholders of a loop's body that hold its carry, and the index of the output that replaces
    each.
    """
    placeholders = [n.name for n in loop_body(node).graph.nodes if n.op == "placeholder"]
    return {name: i for i, name in enumerate(placeholders[: len(node.args[2])])}  # type: ignore[arg-type]


def zeros_like_all(tensors: list[Tensor]) -> list[Tensor]:
    """Accumulators for a list of tensors: contiguous zeros of their shapes, dtypes and devices."""
    return [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in tensors]


def copy_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own with the same values in its metadata; bodies of loops are copied too."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    copy = lazy_module(module, graph)
    for node in copy.graph.nodes:
        if is_loop(node):
            setattr(copy, node.args[0].target, copy_graph(loop_body(node)))
    return copy
