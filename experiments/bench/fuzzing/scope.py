"""What can be read at a place of a random step, and how a line is added.

A line is run at once, on real numbers, and kept if what it makes is small, finite and of modest size.
"""

import random
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ftrain
from experiments.bench.fuzzing.effects import EFFECTS
from experiments.bench.fuzzing.grammar import PURE, Op
from experiments.bench.fuzzing.program import Line

_LARGEST, _MOST = 1e4, 300
_OPS = (*PURE, *EFFECTS)
_WEIGHTS = [op.weight for op in _OPS]


@dataclass
class Value:
    """Something that a line may read: an expression, and what it is here.

    `rows`: its first dim is that of the batch, or it is of the batch otherwise; `argument`: memory of an argument.
    """

    expression: str
    value: Any
    rows: bool = False
    argument: bool = False


@dataclass
class Scope:
    """`by_rows`: only ops that work row by row are used on rows, so that ranks may share the rows."""

    rng: random.Random
    names: dict[str, Any]
    by_rows: bool = False
    prefix: str = "v"
    values: list[Value] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    _owned: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.names.update(torch=torch, F=F, ftrain=ftrain)

    def give(self, expression: str, value: Any, *, rows: bool = False) -> None:
        """Let lines read something; memory of arguments is known from now on."""
        if isinstance(value, Tensor):
            self._owned.add(value.untyped_storage().data_ptr())
        self.values.append(Value(expression, value, rows, argument=True))

    def inner(self, prefix: str) -> "Scope":
        """A scope that reads what this one does, for a function within."""
        made = Scope(self.rng, dict(self.names), self.by_rows, prefix, list(self.values), [])
        made._owned = set(self._owned)
        return made

    def grow(self, count: int) -> None:
        """Add up to `count` random lines."""
        for _ in range(count):
            for _ in range(8):
                if self.add(self.rng.choices(_OPS, _WEIGHTS)[0]):
                    break

    def add(self, op: Op) -> Value | None:
        """Add one line of an op, if there is something for each of its holes and the result will do."""
        chosen: list[Value] = []
        for kind in op.holes:
            fitting = [v for v in self.values if self.fits(kind, v, chosen)]
            if kind == "C":
                fitting = [v for v in fitting if not any(_share_memory(v.value, other.value) for other in chosen)]
            if not fitting:
                return None
            recent = fitting[-4:] if self.rng.random() < 0.6 else fitting
            chosen.append(self.rng.choice(recent))
        if self.by_rows and not op.rows and any(v.rows for v in chosen):
            return None
        out = f"{self.prefix}{len(self.lines)}" if op.makes else None
        return self.run(Line(op.text, tuple(v.expression for v in chosen), out, op.feature), chosen)

    def run(self, line: Line, read: list[Value]) -> Value | None:
        """Run a line and keep it if its result will do."""
        try:
            with torch.no_grad():
                exec(line.source(), self.names)
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError, AttributeError):
            return None
        made = self.names.get(line.out) if line.out else read[0].value
        if not _will_do(made):
            return None
        self.lines.append(line)
        if line.out is None:
            return read[0]
        shared = isinstance(made, Tensor) and made.untyped_storage().data_ptr() in self._owned
        value = Value(line.out, made, any(v.rows for v in read), shared)
        self.values.append(value)
        return value

    def floats(self) -> list[Value]:
        """Floating tensors, the latest last."""
        return [v for v in self.values if isinstance(v.value, Tensor) and v.value.is_floating_point()]

    def fits(self, kind: str, v: Value, chosen: list[Value]) -> bool:
        """True if a value may stand in a hole of this kind, beside those chosen for the holes before it."""
        x = v.value
        if kind == "n":
            return type(x) in (int, float)
        if not isinstance(x, Tensor):
            return False
        if kind == "k":
            return v.expression.endswith(('"key"]', ".key"))
        first = chosen[0] if chosen else None
        if first is not None and self.by_rows and not _rows_agree(kind, first, v):
            return False
        if kind in "lbe":
            wanted = torch.bool if kind == "b" else torch.int64
            shaped = kind != "e" or (first is not None and x.shape == first.value.shape[:-1] and x.dim() > 0)
            return x.dtype == wanted and shaped
        if not x.is_floating_point():
            return False
        return _float_fits(kind, v, x, first.value if first else None, self.by_rows)


def _float_fits(kind: str, v: Value, x: Tensor, first: Tensor | None, by_rows: bool) -> bool:
    least = 2 if v.rows and by_rows else 1
    alone = {
        "f": True,
        "v": x.dim() >= least,
        "m": x.dim() >= 2,
        "q": x.dim() == 2 and x.shape[0] == x.shape[1],
        "s": x.dim() == 0,
        "t": not v.argument,
        "T": not v.argument and x.dim() >= least,
        "a": v.argument,
        "0": True,
    }
    if kind in alone:
        return alone[kind]
    if first is None:
        return False
    if kind == "=":
        return x.shape == first.shape and x.dtype == first.dtype
    if kind == "C":  # two of them are written, so they must not be one
        return first.dim() >= 2 and x.dim() == 1 and x.shape[0] == first.shape[1] and not v.argument
    if x.dtype != first.dtype or not first.dim():
        return False
    if kind == "c":
        return x.dim() == 1 and x.shape[0] == first.shape[-1]
    if kind == "w":
        return x.dim() == 2 and x.shape[0] == first.shape[-1]
    shorter = x.dim() < first.dim()
    return kind == "r" and shorter and all(a in (1, b) for a, b in zip(x.shape[::-1], first.shape[::-1], strict=False))


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _rows_agree(kind: str, first: Value, v: Value) -> bool:
    return v.rows == first.rows if kind in "=e" else not v.rows


def _will_do(made: Any) -> bool:
    if not isinstance(made, Tensor):
        return isinstance(made, int | float)
    if made.numel() > _MOST or made.numel() == 0 or made.is_complex() or made.layout is not torch.strided:
        return False
    return not made.is_floating_point() or bool(made.abs().max() < _LARGEST)
