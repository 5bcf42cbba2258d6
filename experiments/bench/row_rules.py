"""Are the rules of rows right? Each op of torch's own catalogue (`op_db`, about 600 with their sample inputs), on the
first and the second half of its rows, against what `ftrain.trace.batch_rows` says of the op's graph.

    python -m experiments.bench.row_rules [--only softmax gather] [--json FILE]

- wrong: a rule says that the result has the rows, and the halves, joined, are not the whole.
- refused needlessly: the halves, joined, are the whole, and no rule says so.

Draws, and slices of the rows (which the trace refuses by another rule), are left out. Needs `expecttest`.
"""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from experiments.bench.table import publish, row
from ftrain.trace.batch_kinds import SAME, UNKNOWN, Kind
from ftrain.trace.batch_rows import by_rule
from ftrain.trace.spread_ops import CONSTANTS

_SAMPLES = 10  # of each op
_RANDOM = ("dropout", "bernoulli", "multinomial", "rrelu", "lowrank", "multi_head_attention")
_BY_COUNT = ("linalg.vander", "cross")  # which do something else for other numbers of rows
_COPIES = ("_copy", "resize_", "new_empty")  # ops for compilers, which no user calls


@dataclass
class Found:
    """Of one op or all: samples tried, and lines that say what is wrong, and what is refused needlessly."""

    tried: int = 0
    wrong: list[str] = field(default_factory=list)
    needless: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RowRules:
    """`only`: names of ops; empty: all. `json`: a file for the rows."""

    only: tuple[str, ...] = ()
    json: Path | None = None


def main(options: RowRules) -> None:
    """Try all, and print two rows and the lines behind them."""
    from torch.testing._internal.common_methods_invocations import op_db

    ops = [op for op in op_db if not options.only or op.name in options.only]
    ops = [op for op in ops if not any(part in op.name for part in (*_RANDOM, *_BY_COUNT, *_COPIES))]
    total, crashed = Found(), list[str]()
    for i, op in enumerate(ops):
        found = _apart(op)
        if found is None:
            crashed.append(op.name)
            continue
        total.tried += found.tried
        total.wrong += found.wrong
        total.needless += found.needless
        if i % 50 == 0:
            print(f"{i} of {len(ops)} ops, {total.tried} samples", flush=True)
    for line in (*total.wrong, *sorted(set(total.needless))):
        print(line)
    how = f"{total.tried} samples of {len(ops)} ops; torch itself crashed on {', '.join(crashed) or 'none'}"
    needless = len({line.split()[1] for line in total.needless})
    rows = [
        row("rules of rows that are wrong", len(total.wrong), "samples", goal=0, how=how),
        row("ops refused though they keep rows apart", needless, "ops", how=how),
    ]
    publish(rows, "Rules of rows on torch's own ops", options.json)


def _apart(op: Any) -> Found | None:
    """What is found of an op in a process of its own, since some ops break it; None if so."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        with os.fdopen(write, "wb") as pipe:
            pipe.write(pickle.dumps(_try(op)))
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return pickle.loads(answer) if answer else None


def _try(op: Any) -> Found:
    found = Found()
    try:
        samples = list(op.sample_inputs("cpu", torch.float32, requires_grad=False))[:_SAMPLES]
    except Exception:  # ops without samples for this dtype
        return found
    for sample in samples:
        for run, inputs, divided in _calls(op, sample):
            _compare(op.name, run, inputs, divided, found)
    return found


def _calls(op: Any, sample: Any) -> Iterator[tuple[Callable[..., Any], list[Tensor], list[int]]]:
    """The op as a function of tensors, its inputs, and which of them have the rows: the first, and others like it."""
    places = [i for i, arg in enumerate(sample.args) if isinstance(arg, Tensor)]
    first = sample.input
    drops = sample.kwargs.get("dropout_p")
    if not isinstance(first, Tensor) or first.dim() < 1 or len(first) < 4 or drops:
        return
    inputs = [first, *(sample.args[i] for i in places)]

    def run(*tensors: Tensor) -> Any:
        given = iter(tensors[1:])
        return op.op(
            tensors[0], *(next(given) if i in places else a for i, a in enumerate(sample.args)), **sample.kwargs
        )

    alike = [i for i, x in enumerate(inputs) if x.dim() == first.dim() and x.shape[:1] == first.shape[:1]]
    yield run, inputs, alike
    if len(alike) > 1 and all(len(inputs[i]) == 1 for i in alike[1:]):
        yield run, inputs, [0]


def _compare(name: str, run: Callable[..., Any], inputs: list[Tensor], divided: list[int], found: Found) -> None:
    half = len(inputs[0]) // 2
    try:
        whole, again = (_tensors(run(*(x.clone() for x in inputs))) for _ in range(2))
        if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(whole, again, strict=True)):
            return  # it draws
        parts = [
            _tensors(run(*((x[cut] if i in divided else x).clone() for i, x in enumerate(inputs))))
            for cut in (slice(0, half), slice(half, None))
        ]
        said, what = _said(run, inputs, divided)
    except Exception:  # an op that halves of its rows are no input of, or that a trace cannot hold
        return
    found.tried += 1
    shapes = [tuple(x.shape) for x in inputs]
    if said == "kinds":
        kinds = zip(what, whole, *parts, strict=False)
        wrong = [k for k, w, a, b in kinds if k.what == "rows" and k.ordered and not _joins(w, a, b, k.dim)]
        found.wrong += [f"wrong: {name} {k} {shapes}" for k in wrong[:1]]
    elif any(all(_joins(w, a, b, dim) for w, a, b in zip(whole, *parts, strict=False)) for dim in range(4)):
        found.needless.append(f"needless: {what} ({name}): {said}")


def _joins(whole: Tensor, first: Tensor, second: Tensor, dim: int) -> bool:
    try:
        joined = torch.cat([first, second], dim)
    except (IndexError, RuntimeError):  # of other sizes
        return False
    return joined.shape == whole.shape and torch.allclose(joined, whole, atol=1e-5, equal_nan=True)


def _said(run: Callable[..., Any], inputs: list[Tensor], divided: Sequence[int]) -> tuple[str, Any]:
    """ "kinds" and those of the results, or "mixes" or "unknown" and the op."""
    graph = make_fx(run)(*(x.clone() for x in inputs)).graph
    kinds = dict[fx.Node, Kind]()
    for place, node in enumerate(graph.nodes):
        given = {n: kinds[n] for n in node.all_input_nodes}
        if node.op == "output":
            return "kinds", [given[n] for n in node.all_input_nodes]
        kinds[node] = SAME
        if node.op == "placeholder" and place in divided:
            kinds[node] = Kind("rows", 0, "rows")
        elif node.op == "call_function" and node.target not in CONSTANTS and any(k != SAME for k in given.values()):
            told = by_rule(node, given)
            if told.mixes or (told.kind == UNKNOWN and node.users):
                return ("mixes" if told.mixes else "unknown"), node.target
            kinds[node] = told.kind
    raise AssertionError("a graph has an output")


def _tensors(result: Any) -> list[Tensor]:
    return [x for x in (result if isinstance(result, tuple | list) else (result,)) if isinstance(x, Tensor)]


if __name__ == "__main__":
    main(tyro.cli(RowRules))
