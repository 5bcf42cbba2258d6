"""Functionalization: replace in-place ops by pure ones."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.torch_private import (
    emit_node,
    fake_mode_of,
    trace_to_graph,
    tracing_graph,
    unwrap_functional,
    wrap_functional,
)
from ftrain.trace.fills import FILLS_LIKE, fill_as_eager, note_fill
from ftrain.trace.layout_reads import MADE_CONTIGUOUS
from ftrain.trace.list_writes import split_list_writes
from ftrain.trace.open_writes import open_writes
from ftrain.trace.overlapping_writes import settle_overlapping_writes
from ftrain.trace.preview import strip_preview


class WritesInputs(ValueError):
    """A step writes into its arguments, those of `paths`."""

    def __init__(self, message: str, paths: Sequence[str]) -> None:
        super().__init__(message)
        self.paths = tuple(paths)


def mutating_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose op writes into one of its arguments, by its schema."""
    return [
        n
        for n in module.graph.nodes
        if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable
    ]


def functionalize(
    module: fx.GraphModule,
    input_paths: list[str],
    *,
    name_of_captured: Callable[[torch.Tensor], str] = lambda _: "a tensor",
) -> fx.GraphModule:
    """The same graph without in-place ops: writes into temporaries become new values. No bit changes.

    - `input_paths`: the paths of the placeholders, for messages.
    - `name_of_captured`: the user's name of a captured tensor, for messages.

    A graph without in-place ops is returned itself. Bodies of loops are treated in the same way. ValueError, with the
    user's line, for a write that reaches an argument of the step (`WritesInputs`) or a captured tensor (steps are
    pure), and for a write through a view whose elements share memory.
    """
    for loop in [n for n in module.graph.nodes if is_loop(n)]:
        paths = _paths_in_body(loop, input_paths)
        setattr(module, loop.args[0].target, functionalize(loop_body(loop), paths, name_of_captured=name_of_captured))
        strip_preview(loop)
    open_writes(module)
    culprits = mutating_nodes(module)
    if not culprits:
        return module
    _require_own_ops(culprits)
    split_list_writes(module, culprits)
    culprits = mutating_nodes(module)
    settle_overlapping_writes(culprits)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    fakes = [n.meta["val"] for n in placeholders]
    for node in culprits:
        note_fill(node)
    marker = _KeepMeta(module, name_of_captured)
    with fake_mode_of(fakes):
        pure = trace_to_graph(torch.func.functionalize(marker.run_flat, remove="mutations"), fakes)
    names = [n.name for n in pure.graph.nodes if n.op == "placeholder"]
    written = [input_paths[names.index(n.args[0].name)] for n in mutating_nodes(pure)]  # type: ignore[union-attr]
    if written:
        lines = sorted({str(n.meta.get("source")) for n in culprits})
        raise WritesInputs(
            f"the step writes into its input {written[0]!r} (in-place ops at {'; '.join(lines)}): a step is pure, so "
            "make a new value, e.g. x = x + y, and return it",
            written,
        )
    fill_as_eager(pure)
    return pure


def _require_own_ops(culprits: Sequence[fx.Node]) -> None:
    """ValueError, with the user's line, for an op that torch.library knows to write and that has no pure form."""
    for node in culprits:
        op = node.target
        if isinstance(op, torch._ops.OpOverload) and op.namespace not in ("aten", "prims"):
            written = ", ".join(a.name for a in op._schema.arguments if a.is_write)
            raise ValueError(
                f"{node.meta.get('source')}: {op._schema.name} writes into its argument {written} (mutates_args), and "
                "a step makes new values: let the op return what it writes, with mutates_args=()"
            )


def _paths_in_body(loop: fx.Node, input_paths: list[str]) -> list[str]:
    """The names of the inputs of a loop's body: paths for leaves of the step and parts of them, else nodes."""
    placeholders = [n for n in loop.graph.nodes if n.op == "placeholder"]
    known = dict(zip(placeholders, input_paths, strict=True))
    given = [n for group in loop.args[2:] for n in group]  # type: ignore[union-attr]
    return [known.get(_divided(n), f"a loop's input {n}") for n in given]


def _divided(node: Any) -> Any:
    """The base of a view that divides it into micro-batches; any other node itself."""
    return node.args[0] if node.target is torch.ops.aten.view.default else node


@contextmanager
def _explain_overlaps(n: fx.Node) -> Iterator[None]:
    """ValueError for a write through a view whose elements share memory."""
    try:
        yield
    except RuntimeError as error:
        if "internal overlap" not in str(error):
            raise
        raise ValueError(
            f"{n.meta.get('source')}: the step writes into a view whose elements share memory ({n.target}), so that "
            "what is written depends on the order: write into a copy, e.g. x.unfold(...).clone(), or make a new value"
        ) from error


def _hand_on(old: fx.Node, new: fx.Node, keys: Sequence[str]) -> None:
    for key in keys:
        if key in old.meta:
            new.meta.setdefault(key, old.meta[key])


class _KeepMeta(fx.Interpreter):
    """Run a graph under another trace, and copy each node's provenance to the nodes that it creates there."""

    def __init__(self, module: fx.GraphModule, name_of_captured: Callable[[torch.Tensor], str]) -> None:
        super().__init__(module)
        self.extra_traceback = False  # our errors name the user's line already
        self._name_of_captured = name_of_captured
        self._captured: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._writing = set(mutating_nodes(module))

    def run_flat(self, *args: Any) -> Any:
        return self.run(*args)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Wrap captured tensors too, or values computed only from them would not be functionalized."""
        value = super().get_attr(target, args, kwargs)
        if not isinstance(value, torch.Tensor):
            return value
        self._captured.append((value, wrap_functional(value)))
        return self._captured[-1][1]

    def run_node(self, n: fx.Node) -> Any:
        graph = tracing_graph()
        before = len(graph.nodes) if graph is not None else 0
        with _explain_overlaps(n):
            out = self._emit_loop(n) if is_loop(n) else super().run_node(n)
        if n in self._writing:
            self._refuse_writes_to_captured(n)
        if graph is not None:
            left = [node for _, node in zip(range(len(graph.nodes) - before), reversed(graph.nodes), strict=False)]
            for node in left:
                _hand_on(n, node, ("source", "phase", "seq_nr", "purpose", "filled", FILLS_LIKE))
            if left:  # the others regenerate views of the written tensor
                same = next((m for m in left if m.target == n.target), left[0])
                _hand_on(n, same, ("spread", "spread_if_clean", MADE_CONTIGUOUS))
        return out

    def _refuse_writes_to_captured(self, n: fx.Node) -> None:
        for value, wrapped in self._captured:
            if unwrap_functional(wrapped) is not value:
                name = self._name_of_captured(value)
                raise ValueError(
                    f"the step writes into {name}, which it captures, at {n.meta.get('source')}: a step is pure, so "
                    "keep it in the state (of a module: torch.func.functional_call with copies of the buffers), and "
                    "return its new value"
                )

    def _emit_loop(self, n: fx.Node) -> list[torch.Tensor]:
        """Emit a loop as one node; running it would unroll it."""
        (body, rounds, *tensors), _ = self.fetch_args_kwargs_from_env(n)
        groups = [[unwrap_functional(t) for t in group] for group in tensors]
        outputs = emit_node(n.target, body, n.name, (rounds, *groups), list(n.meta["val"]), {})  # type: ignore[arg-type]
        return [wrap_functional(t) for t in outputs]
