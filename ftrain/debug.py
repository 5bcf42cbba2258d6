"""Where a NaN or an infinity was born: the step's graph, run node by node until a value is not finite."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ftrain.interpret import Iteration, interpret
from ftrain.jit import Step, jit
from ftrain.text import op_name, short_site, show_node, show_value

# What they leave in memory, or the infinity they write, is not a result of computing.
_UNWRITTEN = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"}
_CONSTANTS = {"full", "full_like", "new_full", "fill", "masked_fill", "scalar_tensor", "constant_pad_nd", "where"}


class Range(NamedTuple):
    """An input of the culprit: its node, parameter path, type, and the least and greatest of its finite values."""

    name: str
    path: str
    type: str
    finite: bool
    low: float
    high: float


@dataclass(frozen=True)
class Finding:
    """The first value that is not finite.

    `kind` "NaN" or "infinity"; `node`, `op`, `phase`, `path` (of the parameter that the node is about; of the leaf
    itself if an argument is not finite: then `op` is "input"), `site` (file:line); `count` of `size` elements are not
    finite; `inputs` of the op; `iterations` of the loops that the node is inside of.
    """

    kind: str
    node: str
    op: str
    phase: str
    path: str
    site: str
    count: int
    size: int
    line: str
    inputs: tuple[Range, ...]
    iterations: tuple[Iteration, ...]

    def __str__(self) -> str:
        where = "".join(f", in round {i.round} of {i.loop}" for i in self.iterations)
        if self.op == "input":
            return f"argument leaf {self.path!r} holds {self.kind} in {self.count} of {self.size} elements: {self.line}"
        head = f"first {self.kind} in the {self.phase} phase at {self.site or 'an unknown line'}{where}"
        about = f", about {self.path}" if self.path else ""
        rows = [f"  {r.name}{f' ({r.path})' if r.path else ''}: {r.type}, {_describe(r)}" for r in self.inputs]
        made = f"{self.line}\n  made {self.kind} in {self.count} of {self.size} elements{about}"
        return "\n".join([head, made, *(["from inputs"] if rows else []), *rows])


class _Found(Exception):
    def __init__(self, finding: Finding) -> None:
        self.finding = finding


def check_finite(step: Step | Callable, *args: Any) -> Finding | None:
    """Run the step's graph node by node and return the first node that made a NaN or an infinity; None if none did.

    `step` is jitted or a plain function; `args` are as for a call of it. Nothing of the arguments is modified: donated
    leaves are copied first. A NaN counts always. An infinity counts unless it is meant: written by a fill or `where`
    (as masks do), or handed on from an input that already held one. An argument leaf that holds either is found before
    anything is run. Print the finding for one paragraph with op, parameter path, source line and ranges of the inputs.
    """
    step = step if isinstance(step, Step) else jit(step)
    compiled, leaves = step.lower(*args), step.flat_inputs(*args)
    for path, leaf in zip(compiled.traced.input_paths, leaves, strict=True):
        if (bad := _not_finite(leaf, inf=True)) is not None:
            line = f"{show_value(leaf)}, {_describe(_range(path, path, leaf))}"
            return Finding(*bad[:1], path, "input", "input", path, "", bad[1], leaf.numel(), line, (), ())
    try:
        interpret(compiled.graph, leaves, _visit)
    except _Found as found:
        return found.finding
    return None


def _visit(node: fx.Node, inside: tuple[Iteration, ...], args: tuple, kwargs: dict[str, Any]) -> Any:
    value = node.target(*args, **kwargs)  # type: ignore[operator]
    name = op_name(node).split(".")[0]
    if name in _UNWRITTEN:
        return value
    given = _named_inputs(node, args, kwargs)
    inherited = any(bool(torch.isinf(t).any()) for _, t in given if t.is_floating_point())
    for v in value if isinstance(value, list | tuple) else [value]:
        bad = _not_finite(v, inf=not inherited and name not in _CONSTANTS)
        if bad is not None:
            ranges = tuple(_range(n.name, n.meta.get("path") or "", t) for n, t in given)
            raise _Found(_finding(node, bad, v, ranges, inside))
    return value


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
        site=short_site(meta.get("site")),
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


def _named_inputs(node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> list[tuple[fx.Node, Tensor]]:
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
