"""One program, jitted against plain eager PyTorch: equal, refused, an error in other words than ours, or different."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ftrain
from experiments.bench.fuzzing.eager import Call, run_eagerly, snapshot
from experiments.bench.fuzzing.program import Program
from experiments.bench.fuzzing.source import load
from ftrain import tree

OUTCOMES = ("equal", "refused", "raw error", "different", "crash", "unstable", "no program")
"""`unstable`: the eager numbers themselves move as much when the inputs move in their last bits. `no program`: it does
not run eagerly."""

FAILURES = ("different", "crash", "raw error")

_EXACT, _SINGLE, _LOW = 1e-10, 1e-4, 2e-2
_WAYS_OUT = re.compile(
    r"\b(pass|keep|take|give|clone|use|return|write|make|choose|call|mask|compute|add|put|name|register|set|run|copy|"
    r"or be|debug|pad|pack|divide|must be|raise)\b"
)
_LEAF = re.compile(r"'(state|batch|p\d|params?|g\d)?[\w.\[\]]*'")
_OPTION = re.compile(r"\b(donate|plan|specs|batch|Remat|Layout|Mesh|accumulated?|precision)\b")


@dataclass(frozen=True)
class Result:
    """How a program came out; `detail`: the message, or what differs, by how much."""

    outcome: str
    detail: str = ""

    @property
    def kind(self) -> str:
        """What failures of one cause have in common, by words alone: for counts, and to shrink towards the same."""
        words = re.sub(r"'[^']*'|fuzz_\d+\.py:\d+|\d[\d.e+-]*|\[[^\]]*\]|\([^)]*\)", "#", self.detail.split("\n")[0])
        return f"{self.outcome}: {words[:110]}"


def check(program: Program) -> Result:
    """Run the program's calls on both sides and compare everything that they return, and what they leave behind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = run_eagerly(program)
        except Exception as error:
            return Result("no program", f"{type(error).__name__}: {error}")
        found = _run_jitted(program, expected)
        if found.outcome == "different" and _is_unstable(program, expected, found):
            return Result("unstable", found.detail)
        return found


def _run_jitted(program: Program, expected: list[Call]) -> Result:
    names, close = load(program), tolerance(program)
    step: Any = None
    held, state = list[Any](), names["make_state"]()
    captured = {name: names[name] for name, _ in program.captured}
    constants = snapshot(captured)
    for number, rows in enumerate(program.options.rows):
        torch.manual_seed(0)
        batch = names["make_batch"](rows)
        arguments = batch if program.options.donate else (state, batch)
        before = snapshot(arguments)
        try:
            step = step or ftrain.jit(names["step"], **names["OPTIONS"])
            state, metrics = step(state, batch)
        except ValueError as error:
            return _refusal(program, str(error), type(error).__name__)
        except Exception as error:
            return Result("raw error", f"{type(error).__name__}: {_first_line(error)}")
        held.append(metrics)
        try:
            difference = _changed("state", expected[number][0], state, close)
            difference = difference or _changed("an argument", before, arguments)
            difference = difference or _changed("a captured tensor", constants, captured)
            for i, result in enumerate(held):
                difference = difference or _changed(f"metrics of call {i}", expected[i][1], result, close)
        except (ValueError, RuntimeError) as error:
            difference = f"a result cannot be read: {_first_line(error)}"
        if difference:
            return Result("different", f"call {number}: {difference}")
    return Result("equal")


def _refusal(program: Program, words: str, kind: str) -> Result:
    """A refusal, if it says where and what to do instead."""
    line = program.file.replace(".", r"\.") + r":\d+"
    where = re.search(line, words) or _LEAF.search(words) or _OPTION.search(words)
    if where and _WAYS_OUT.search(words):
        return Result("refused", words)
    return Result("raw error", f"{kind} without {'a way out' if where else 'a place'}: {words}")


def _difference(expected: Call, found: Call, close: float) -> str:
    changed = (_changed(what, a, b, close) for what, a, b in zip(("state", "metrics"), expected, found, strict=True))
    return next((words for words in changed if words), "")


def _changed(what: str, expected: Any, found: Any, close: float = 0.0) -> str:
    """How a tree differs from what it ought to be; numbers may be apart by `close`, relative to their size."""
    try:
        tree.require_same(expected, found, names=("eager", "jitted"))
    except ValueError as error:
        return f"{what}: {error}"
    for path, a, b in zip(tree.paths(expected), tree.leaves(expected), tree.leaves(found), strict=True):
        difference = _leaf_difference(a, b, close)
        if difference:
            return f"{what} {path}: {difference}"
    return ""


def tolerance(program: Program) -> float:
    """How far numbers may be apart, relative to their size: rounding, where sums are made in another order."""
    options = program.options
    if options.precision:
        return _LOW
    text = " ".join([*(line.text for line in program.lines()), *(text for _, text in program.leaves)])
    half = any(word in text for word in ("bfloat16", "half()"))
    if not half and not any(word in text for word in ("float32", ".float()")):
        return _EXACT
    reordered = options.mesh or options.backend != "aten" or any(loss.micro_batches > 1 for loss in program.losses)
    return _LOW if half and reordered else _SINGLE


def _leaf_difference(a: Any, b: Any, close: float) -> str:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return "" if type(a) is type(b) and a == b else f"{a!r} became {b!r}"
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{tree.describe(a)} became {tree.describe(b)}"
    apart = _apart(a, b)
    return "" if apart <= close else f"apart by {apart:.3g}"


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to numbers above one; numbers that are not finite must be the same."""
    x, y = a.detach().double(), b.detach().double()
    same = (x == y) | (x.isnan() & y.isnan())
    away = ((x - y).abs() / (1 + x.abs())).nan_to_num(torch.inf).masked_fill(same, 0.0)
    return float(away.max()) if away.numel() else 0.0


def _is_unstable(program: Program, expected: list[Call], found: Result) -> bool:
    """True if a change of the inputs in their last bits moves the eager numbers nearly as much."""
    apart = re.search(r"apart by ([\d.e+-]+)", found.detail)
    if apart is None:
        return False
    try:
        nudged = run_eagerly(program, nudge=1e-13 if program.options.precision is None else 1e-3)
    except (RuntimeError, ValueError):
        return True
    close = float(apart.group(1)) / 100
    return any(_difference(a, b, close) for a, b in zip(expected, nudged, strict=True))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block torch uses one thread: tensors are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
