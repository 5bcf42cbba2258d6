"""The tracer: from a pure function and the shapes of its arguments to one flat graph of ATen ops.

Every tensor leaf of the arguments becomes a fake tensor of its own, also if two leaves share memory. The function runs
once on these fake tensors, and each op, of forward, backward and optimizer update, becomes a node.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ftrain import tree
from ftrain.graph.absent_device import absent_device, choosing_for, put_on, traceable
from ftrain.graph.layouts import laid_plainly
from ftrain.graph.torch_private import (
    FakeTensor,
    new_fake_mode,
    snapshot,
    trace_to_graph,
)
from ftrain.trace.ambient import tracing_modes
from ftrain.trace.captured import captured_name, captured_tensors, require_untrained
from ftrain.trace.constants import share_memory_of_constants
from ftrain.trace.counters import require_no_lost_counters
from ftrain.trace.functionalize import functionalize
from ftrain.trace.layout_reads import LayoutReads
from ftrain.trace.leaf_layouts import LeafLayouts
from ftrain.trace.leaks import recording_modules, require_none_left, require_tree_leaf
from ftrain.trace.own_draws import no_draws_of_python
from ftrain.trace.precision import Precision, computing_in
from ftrain.trace.provenance import recording
from ftrain.trace.recurrent import train_recurrent
from ftrain.trace.refusals import RefuseUnseen, explain_refusals, require_dense


@dataclass(frozen=True)
class Aval:
    """An abstract value: the shape, dtype and device of a tensor, without data.

    A trace reads only this of a tensor. In place of a tensor, an `Aval` lowers a step without data.

    >>> import torch
    >>> import ftrain
    >>> print(ftrain.Aval.of(torch.zeros(2, 3)))
    float32[2,3]
    >>> step = ftrain.jit(lambda x: (x * 2).sum())
    >>> compiled = step.lower(ftrain.Aval((1024, 1024), torch.float32, torch.device("cpu")))
    >>> compiled.memory().inputs  # bytes
    4194304
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(leaf: Any) -> "Aval":
        """The abstract value of a tensor, or of an object with `shape` and `dtype`; the device is a CPU by default."""
        device = getattr(leaf, "device", None) or torch.device("cpu")
        return Aval(tuple(leaf.shape), leaf.dtype, torch.device(device))

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{','.join(map(str, self.shape))}]"


@dataclass
class Traced:
    """A trace: a flat graph with one placeholder per tensor leaf of the arguments and one output per tensor result.

    - `module`: the graph.
    - `input_paths`, `input_avals`: path and abstract value of each placeholder.
    - `output_paths`: path of each output. `output_tree`: the structure of the function's result.
    - `static_outputs`: leaves of the result that are not tensors, by their position among all leaves.
    """

    module: fx.GraphModule
    input_paths: list[str]
    input_avals: list[Aval]
    output_paths: list[str]
    output_tree: Any
    static_outputs: dict[int, Any]
    changed: list[tuple[nn.Module, str, Any]]
    """Attributes of modules with plain values that the function has changed: module, name, and the value before."""
    layouts: LeafLayouts
    """Refuses leaves that are not contiguous where the results depend on it."""
    name_of: Callable[[Tensor], str] = lambda _: "a tensor"
    """The user's name of a captured tensor, for messages."""

    def contiguous(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """The leaves as contiguous tensors, in the order of `input_paths`; those that are not contiguous are copied,
        and so are lazy conjugates and negatives.

        ValueError, with leaf and line, if the results depend on the layout of a leaf that is not contiguous.
        """
        self.layouts.require_same_results(leaves)
        return [laid_plainly(leaf) for leaf in leaves]

    def assemble(self, tensors: Sequence[Tensor]) -> Any:
        """The function's result, from the flat outputs of the graph and the leaves that are not tensors."""
        if self.static_outputs:
            remaining = iter(tensors)
            count = len(tensors) + len(self.static_outputs)
            tensors = [self.static_outputs[i] if i in self.static_outputs else next(remaining) for i in range(count)]
        return tree.unflatten(self.output_tree, tensors)


def is_array(leaf: Any) -> bool:
    """True for leaves that are data: tensors and abstract values. Others (numbers, strings) are constants."""
    return isinstance(leaf, Tensor | Aval)


def signature_of(leaf: Any) -> Any:
    """The part of a trace's key for a leaf: the abstract value of a tensor, or the type and value of a constant."""
    if is_array(leaf):
        return Aval.of(leaf)
    return (type(leaf), leaf, str(leaf)) if leaf == 0 else (type(leaf), leaf)  # 0.0 and -0.0 are equal


def trace(
    function: Callable[..., Any], args: tuple[Any, ...], names: Sequence[str], *, precision: Precision | None = None
) -> Traced:
    """Trace `function(*args)` to a flat graph.

    - `args`: trees whose leaves are tensors (real, meta or fake) or `Aval`s, of which only shape, dtype and device are
      read, or other values, which are constants of the trace.
    - `names`: the names of the arguments, the first parts of the leaves' paths.
    - `precision`: the dtypes of compute and of gradient sums; None leaves both to the parameters.

    For a CUDA device that this machine does not have, the graph is that of a machine with a card (see
    `ftrain.graph.absent_device`).

    ValueError, most often with the user's line, for code that a trace cannot hold (`ftrain.trace.refusals`): a
    branch on a tensor's values, a write into an argument or a captured tensor, a captured tensor that requires a
    gradient, numbers drawn with Python's or numpy's generators, a tensor of the trace kept outside of the result, and
    a tensor of another trace.
    """
    leaves, treedef = tree.flatten(args)
    paths = argument_paths(args, names)
    slots = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
    avals = [Aval.of(leaves[i]) for i in slots]
    result: list[_Result] = []
    reads = LayoutReads()

    def flat(*tensors: Tensor) -> list[Tensor]:
        filled = list(leaves)
        for i, tensor in zip(slots, tensors, strict=True):
            filled[i] = tensor
        run = lambda: function(*tree.unflatten(treedef, filled))  # noqa: E731
        out = run()
        require_no_lost_counters(modules, reads, run)
        reads.settle()
        out_leaves, out_tree = tree.flatten(out)
        result.append(_Result.of(out_leaves, out_tree, tree.paths(out)))
        return [leaf for leaf in out_leaves if isinstance(leaf, Tensor)]

    absent = absent_device(a.device for a in avals)
    with recording_modules() as modules, no_draws_of_python() as draws:
        try:
            with (
                tracing_modes(),
                new_fake_mode(),
                recording(draws) as provenance,
                computing_in(precision),
                choosing_for(absent),
            ):
                fakes = [torch.empty(a.shape, dtype=a.dtype, device=traceable(a.device)) for a in avals]
                with explain_refusals(), RefuseUnseen(), reads:
                    module = trace_to_graph(flat, fakes)
        except BaseException:
            modules.restore()
            raise
    require_dense(module)
    require_untrained(function, provenance.trained)
    _own_constants(module)
    del fakes, provenance.trained[:]
    modules.require_no_state(captured_tensors(module).values(), provenance.origins.is_fixed)
    require_none_left(provenance.made, modules)
    out = result[-1]
    name_of = partial(captured_name, function)
    module = functionalize(module, [paths[i] for i in slots], name_of_captured=name_of)
    train_recurrent(module)
    share_memory_of_constants(module)
    if absent is not None:
        put_on(module, absent)
    _name_placeholders(module.graph, [paths[i] for i in slots])
    _check_constants(module)
    return Traced(
        module=module,
        input_paths=[paths[i] for i in slots],
        input_avals=avals,
        output_paths=[p for i, p in enumerate(out.paths) if i not in out.statics],
        output_tree=out.tree,
        static_outputs=out.statics,
        changed=modules.changed(),
        layouts=LeafLayouts(module, [paths[i] for i in slots], reads),
        name_of=name_of,
    )


class _Result(NamedTuple):
    """A function's result without its tensors: structure, paths of the leaves, and the leaves that are constants."""

    tree: Any
    paths: list[str]
    statics: dict[int, Any]

    @staticmethod
    def of(leaves: list[Any], structure: Any, paths: list[str]) -> "_Result":
        statics = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        for i, leaf in statics.items():
            require_tree_leaf(paths[i], leaf)
        return _Result(structure, paths, statics)


def argument_paths(args: tuple[Any, ...], names: Sequence[str]) -> list[str]:
    """Dotted paths of all leaves of the arguments, each beginning with the name of its argument.

    >>> from ftrain.trace.tracer import argument_paths
    >>> argument_paths(({"w": 1, "b": 2}, 3), ["params", "x"])
    ['params.b', 'params.w', 'x']
    """
    return [
        ".".join(p for p in (name, path) if p)
        for name, arg in zip(names, args, strict=True)
        for path in tree.paths(arg)
    ]


def _name_placeholders(graph: fx.Graph, paths: list[str]) -> None:
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for node, path in zip(placeholders, paths, strict=True):
        node.meta["path"] = path
        node.meta["phase"] = "input"
        node._rename(path.replace(".", "_").replace("-", "_"))


def _own_constants(module: fx.GraphModule) -> None:
    """Copy the fake values of captured tensors, because those that the step returns belong to the ended trace."""
    for node in module.graph.nodes:
        if node.op == "get_attr" and isinstance(node.meta.get("val"), Tensor):
            node.meta["val"] = snapshot(node.meta["val"])


def _check_constants(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        value = getattr(module, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(value, FakeTensor):
            raise ValueError(
                f"{node.meta.get('source')}: the step uses a tensor of another trace; pass it as an argument"
            )
