"""From a pure function and the shapes of its arguments to one flat graph of ATen ops.

The trace sees shapes alone: every tensor leaf becomes a fake tensor of its own (so two leaves that share memory stay
two), runs through the function once, and leaves a node per op: forward, backward and optimizer update alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ftrain import tree
from ftrain.graph.absent_device import absent_device, choosing_for, put_on, traceable
from ftrain.graph.torch_private import FakeTensor, new_fake_mode, snapshot, trace_to_graph
from ftrain.trace.ambient import as_a_step
from ftrain.trace.captured import captured_name, captured_tensors, require_untrained
from ftrain.trace.constants import share_memory_of_constants
from ftrain.trace.functionalize import functionalize
from ftrain.trace.layout_reads import LayoutReads
from ftrain.trace.leaf_layouts import LeafLayouts
from ftrain.trace.leaks import modules_as_found, require_none_left, require_tree_leaf
from ftrain.trace.own_draws import no_draws_of_python
from ftrain.trace.precision import Precision, computing_in
from ftrain.trace.provenance import recording
from ftrain.trace.recurrent import train_recurrent
from ftrain.trace.refusals import NoExchange, in_our_words, require_dense


@dataclass(frozen=True)
class Aval:
    """What a trace knows of a tensor; also stands for one where a step is lowered without data."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(leaf: Any) -> "Aval":
        """The abstract value of a tensor or of something that has `shape` and `dtype`."""
        device = getattr(leaf, "device", None) or torch.device("cpu")
        return Aval(tuple(leaf.shape), leaf.dtype, torch.device(device))

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{','.join(map(str, self.shape))}]"


@dataclass
class Traced:
    """A flat graph: one placeholder per tensor leaf of the arguments, one output per tensor leaf of the result."""

    module: fx.GraphModule
    input_paths: list[str]
    input_avals: list[Aval]
    output_paths: list[str]
    output_tree: Any
    static_outputs: dict[int, Any]
    changed: list[tuple[nn.Module, str]]
    """Attributes of modules, plain values, that the function has changed."""
    layouts: LeafLayouts
    """Refuses leaves whose layout in memory the step's numbers depend on."""
    name_of: Callable[[Tensor], str] = lambda _: "a tensor"
    """What the user calls a tensor that the function captures."""

    def in_rows(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """The leaves as the graph takes them: copies of those that are not contiguous.

        ValueError, with leaf and line, where the step's numbers depend on how one lies in memory.
        """
        self.layouts.require_alike(leaves)
        return [leaf.contiguous() for leaf in leaves]

    def assemble(self, tensors: Sequence[Tensor]) -> Any:
        """The result's tree, from the graph's flat outputs and the leaves that are not tensors."""
        if self.static_outputs:
            remaining = iter(tensors)
            count = len(tensors) + len(self.static_outputs)
            tensors = [self.static_outputs[i] if i in self.static_outputs else next(remaining) for i in range(count)]
        return tree.unflatten(self.output_tree, tensors)


def is_array(leaf: Any) -> bool:
    """True for what a trace takes as data: tensors and abstract values; numbers and strings are constants."""
    return isinstance(leaf, Tensor | Aval)


def signature_of(leaf: Any) -> Any:
    """What must be equal for a trace to fit: a tensor's abstract value, or the type and value of a constant."""
    return Aval.of(leaf) if is_array(leaf) else (type(leaf), leaf)


def trace(function: Callable, args: tuple, names: Sequence[str], *, precision: Precision | None = None) -> Traced:
    """Trace `function(*args)`; `names` are the names of its arguments, the first components of leaf paths.

    Leaves may be tensors (real, meta or fake) or `Aval`s; only their shapes, dtypes and devices are read. Leaves that
    are not tensors are constants of the trace. For a CUDA device that is not here the graph is that of a machine with
    a card, as far as `ftrain.graph.absent_device` can tell.
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
        out = function(*tree.unflatten(treedef, filled))
        reads.settle()
        out_leaves, out_tree = tree.flatten(out)
        result.append(_Result.of(out_leaves, out_tree, tree.paths(out)))
        return [leaf for leaf in out_leaves if isinstance(leaf, Tensor)]

    absent = absent_device(a.device for a in avals)
    with modules_as_found() as modules, no_draws_of_python() as draws:
        try:
            with (
                as_a_step(),
                new_fake_mode(),
                recording(draws) as provenance,
                computing_in(precision),
                choosing_for(absent),
            ):
                fakes = [torch.empty(a.shape, dtype=a.dtype, device=traceable(a.device)) for a in avals]
                with in_our_words(), NoExchange(), reads:
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
    """What a function returned, without its tensors: structure, paths of the leaves, and those that are constants."""

    tree: Any
    paths: list[str]
    statics: dict[int, Any]

    @staticmethod
    def of(leaves: list[Any], structure: Any, paths: list[str]) -> "_Result":
        statics = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        for i, leaf in statics.items():
            require_tree_leaf(paths[i], leaf)
        return _Result(structure, paths, statics)


def argument_paths(args: tuple, names: Sequence[str]) -> list[str]:
    """Dotted paths of all leaves of the arguments, each starting with its argument's name."""
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
    """The values of captured tensors become the graph's own: one that the step returns is a tensor of the trace."""
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
