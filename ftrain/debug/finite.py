"""Where a NaN or an infinity comes from: the step's graph, run node by node until a value is not finite."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ftrain import tree
from ftrain.graph.collectives import COLLECTIVES, WAIT
from ftrain.graph.text import op_name, short_source, show_node, show_value
from ftrain.runtime.interpret import Iteration, Op, interpret, interpret_ranks
from ftrain.sharding.mesh import BASE_AXES, Mesh
from ftrain.step.api import Step, make_step
from ftrain.trace.tracer import is_array

# Uninitialized memory of the first, and infinities that the second write, are not results of a computation.
_UNWRITTEN = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"}
_CONSTANTS = {"full", "full_like", "new_full", "fill", "masked_fill", "scalar_tensor", "constant_pad_nd", "where"}


class Range(NamedTuple):
    """An input of the op that made a bad value: its node, parameter path, type, whether all its values are finite, and
    the least and greatest of the finite ones.
    """

    name: str
    path: str
    type: str
    finite: bool
    low: float
    high: float


@dataclass(frozen=True)
class Finding:
    """The first value that is not finite.

    - `kind`: "NaN" or "infinity"; `count` of `size` elements are not finite.
    - `node`, `op`, `phase`, `line`: the node that computed it. If an argument is not finite, `op` is "input".
    - `path`: of the parameter that the node is about, or of the argument leaf. `source`: file:line.
    - `inputs`: of the op, with the ranges of their values. `iterations`: of the loops that enclose the node.
    - `rank`: of a virtual mesh, with its coordinates; empty elsewhere.
    """

    kind: str
    node: str
    op: str
    phase: str
    path: str
    source: str
    count: int
    size: int
    line: str
    inputs: tuple[Range, ...]
    iterations: tuple[Iteration, ...]
    rank: str = ""

    def __str__(self) -> str:
        where = "".join(f", in iteration {i.number} of {i.loop}" for i in self.iterations)
        where += f", on {self.rank}" if self.rank else ""
        if self.op == "input":
            return f"argument leaf {self.path!r} holds {self.kind} in {self.count} of {self.size} elements: {self.line}"
        head = f"first {self.kind} in the {self.phase} phase at {self.source or 'an unknown line'}{where}"
        about = f", about {self.path}" if self.path else ""
        rows = [f"  {r.name}{f' ({r.path})' if r.path else ''}: {r.type}, {_describe(r)}" for r in self.inputs]
        made = f"{self.line}\n  made {self.kind} in {self.count} of {self.size} elements{about}"
        return "\n".join([head, made, *(["from inputs"] if rows else []), *rows])


def check_finite(step: Step | Callable[..., Any], *args: Any) -> Finding | None:
    """Run the step's graph node by node and return the first node that made a NaN or an infinity; None if none did.

    `step` is jitted or a plain function; `args` are as for a call of it. The arguments are not modified: donated leaves
    are copied first. A NaN always counts. An infinity counts unless it is meant: written by a fill or `where` (as masks
    do), or passed on from an input that already held one. An argument leaf that holds either is found before anything
    runs. Printed, the finding is a paragraph with op, parameter path, source line and the ranges of the inputs.

    On a virtual mesh all ranks run in lockstep, collectives included, and the finding names the rank. On a mesh of
    processes all call this together; each runs to the end, and returns what its own rank found. ValueError as for
    `Step.lower`.

    >>> import torch, ftrain
    >>> finding = ftrain.debug.check_finite(lambda x: (x - 1).log().sum(), torch.tensor([0.0, 3.0]))
    >>> finding.kind, finding.op, finding.count
    ('NaN', 'log', 1)
    """
    step = step if isinstance(step, Step) else make_step(step)
    compiled = step.lower(*args)
    ranks = step.rank_inputs(*args)
    virtual = compiled.setting.mesh is not None and compiled.setting.mesh.kind == "virtual"
    own = [leaf for leaf in tree.leaves(args) if is_array(leaf)] if virtual else ranks[0]
    for path, leaf in zip(compiled.traced.input_paths, own, strict=False):
        if (bad := _not_finite(leaf, inf=True)) is not None:
            line = f"{show_value(leaf)}, {_describe(_range(path, path, leaf))}"
            return Finding(*bad[:1], path, "input", "input", path, "", bad[1], leaf.numel(), line, (), ())
    if virtual:
        assert compiled.setting.mesh is not None
        return _first_of_ranks(compiled.graph, ranks, compiled.setting.mesh)
    return _first(compiled.graph, ranks[0], to_the_end=compiled.setting.mesh is not None)


class _Found(Exception):
    def __init__(self, finding: Finding) -> None:
        self.finding = finding


def _first(module: fx.GraphModule, inputs: Sequence[Tensor], *, to_the_end: bool) -> Finding | None:
    """`to_the_end`: other ranks wait for this one, so go on after something was found."""
    found: list[Finding] = []

    def visit(node: fx.Node, inside: tuple[Iteration, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        op = Op(node, inside, args, kwargs)
        value = node.target(*args, **kwargs)  # type: ignore[operator]
        if not found and not _on_its_way(node):
            inherited = node.target is not WAIT and _hold_infinity([op])
            found.extend(filter(None, [_finding_in(op, value, inherited=inherited)]))
        if found and not to_the_end:
            raise _Found(found[0])
        return value

    with suppress(_Found):
        interpret(module, inputs, visit)
    return found[0] if found else None


def _on_its_way(node: fx.Node) -> bool:
    """True for a collective whose result is written only when its wait has run."""
    return any(user.target is WAIT for user in node.users)


def _first_of_ranks(module: fx.GraphModule, ranks: Sequence[Sequence[Tensor]], mesh: Mesh) -> Finding | None:
    def look(ops: Sequence[Op], values: Sequence[Any]) -> None:
        collective = ops[0].node.target in COLLECTIVES
        for rank, (op, value) in enumerate(zip(ops, values, strict=True)):
            finding = _finding_in(op, value, inherited=_hold_infinity(ops if collective else [op]))
            if finding is not None:
                raise _Found(replace(finding, rank=_show_rank(mesh, rank)))

    try:
        interpret_ranks(module, ranks, mesh, look)
    except _Found as found:
        return found.finding
    return None


def _show_rank(mesh: Mesh, rank: int) -> str:
    return f"rank {rank} ({', '.join(f'{axis} {mesh.coordinate(rank, axis)}' for axis in BASE_AXES)})"


def _finding_in(op: Op, value: Any, *, inherited: bool) -> Finding | None:
    """What is wrong with the value of an op, if anything; `inherited`: it read an infinity."""
    name = op_name(op.node).split(".")[0]
    if name in _UNWRITTEN:
        return None
    for v in value if isinstance(value, list | tuple) else [value]:
        bad = _not_finite(v, inf=not inherited and name not in _CONSTANTS)
        if bad is not None:
            given = _named_inputs(op.node, op.args, op.kwargs)
            ranges = tuple(_range(n.name, n.meta.get("path") or "", t) for n, t in given)
            return _finding(op.node, bad, v, ranges, op.inside)
    return None


def _hold_infinity(ops: Sequence[Op]) -> bool:
    given = (t for op in ops for _, t in _named_inputs(op.node, op.args, op.kwargs))
    return any(bool(torch.isinf(t).any()) for t in given if t.is_floating_point())


def _finding(
    node: fx.Node, bad: tuple[str, int], value: Tensor, inputs: tuple[Range, ...], inside: tuple[Iteration, ...]
) -> Finding:
    meta = node.meta
    kind, count = bad
    return Finding(
        kind=kind,
        node=node.name,
        op=op_name(node),
        phase=meta.get("phase", ""),
        path=meta.get("path") or "",
        source=short_source(meta.get("source")),
        count=count,
        size=value.numel(),
        line=show_node(node),
        inputs=inputs,
        iterations=inside,
    )


def _not_finite(value: Any, *, inf: bool) -> tuple[str, int] | None:
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return None
    nans = int(torch.isnan(value).sum())
    if nans:
        return "NaN", nans
    infinities = int(torch.isinf(value).sum()) if inf else 0
    return ("infinity", infinities) if infinities else None


def _named_inputs(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[fx.Node, Tensor]]:
    """The nodes that a node reads, each with its value."""
    found: dict[fx.Node, Tensor] = {}

    def pair(source: Any, value: Any) -> None:
        if isinstance(source, fx.Node):
            if isinstance(value, Tensor):
                found[source] = value
        elif isinstance(source, list | tuple):
            for s, v in zip(source, value, strict=True):
                pair(s, v)

    pair(node.args, args)
    pair(tuple(node.kwargs.values()), tuple(kwargs.values()))
    return list(found.items())


def _range(name: str, path: str, value: Tensor) -> Range:
    real = value.abs() if value.is_complex() else value
    finite = real[torch.isfinite(real)].double()
    low, high = (finite.min().item(), finite.max().item()) if finite.numel() else (float("nan"), float("nan"))
    return Range(name, path, show_value(value), finite.numel() == real.numel(), low, high)


def _describe(r: Range) -> str:
    if r.low != r.low:
        return "empty" if r.finite else "nothing finite"
    return f"{'finite' if r.finite else 'not all finite; finite part'} in [{r.low:.4g}, {r.high:.4g}]"
