"""What a row of the coverage bench tries, a column each, and how it is judged."""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf, isnan
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

import ftrain
from experiments.bench.covering.case import Built, Case, NoPeer
from ftrain import tree
from ftrain.modules.spec import Tree, leaves_with_paths
from ftrain.sharding import Layout, Mesh, Plan

COLUMNS = ("builds", "equal", "remat", "shard", "sequence", "expert", "saved")
"""What is tried, in this order. All are compared with the plain module."""
WORST_FIRST = ("not_equal", "breaks", "refused", "no_peer", "equal", "-")
"""The verdicts of a cell: another number, and nothing said of it; words of another library, or of Python; a sentence
of ours; the plain module does not run; as it should be; does not apply."""

LOSS, GRADIENT = 1e-5, 1e-4
"""How far, relative, a loss and a gradient (its norm) may be from the plain module's, in float32."""
_NEARLY_ZERO = 1e-4  # of the largest gradient: below it gradients are compared with that
_OURS = tuple(Path(__file__).resolve().parents[3] / room for room in ("ftrain", "kernels", "sharding", "modules"))
_INSTALLED = re.compile(r"\S*/site-packages/")  # where libraries are on this machine
_MESHES = MappingProxyType(
    {
        "shard": Mesh(shard=2, kind="virtual"),
        "sequence": Mesh(sequence=2, kind="virtual"),
        "expert": Mesh(shard=2, expert=2, kind="virtual"),
    }
)


class Apart(Exception):
    """The numbers are not those of the plain module."""


@dataclass(frozen=True)
class Cell:
    """How a column came out: a verdict (one of `WORST_FIRST`), and the figures or the reason in words."""

    verdict: str
    words: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a row came out. `cells`: by column. `about`: what kind of batch. `seconds`: of the whole row."""

    set: str
    name: str
    cells: Mapping[str, Cell] = field(default_factory=dict)
    about: str = ""
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """That of the model on one device: the worse of "builds" and "equal"."""
        found = {self.cells[c].verdict for c in ("builds", "equal") if c in self.cells}
        return next((v for v in WORST_FIRST if v in found), "-")


def tried(case: Case, columns: tuple[str, ...] = COLUMNS) -> Iterator[tuple[str, Cell]]:
    """The cells of a row as they come; after the first two, only where the row is equal so far."""
    begun = time.perf_counter()
    built, cell = _cell(case.build)
    yield "builds", cell if built is None else Cell("equal", f"{time.perf_counter() - begun:.1f} s")
    if built is None:
        return
    if built.about:
        yield "about", Cell("-", built.about)
    for column in COLUMNS[1:]:
        if column not in columns:
            continue
        if not _applies(built, column):
            yield column, Cell("-")
            continue
        words, cell = _cell(lambda column=column: _try(built, column))
        yield column, cell if words is None else Cell("equal", words)
        if words is None and column == "equal":
            return


def _applies(built: Built, column: str) -> bool:
    if column in ("sequence", "expert"):
        return column in built.splits
    return column != "saved" or built.roundtrip is not None


def _try(built: Built, column: str) -> str:
    if column == "saved":
        assert built.roundtrip is not None
        built.roundtrip()
        return "all names, all numbers"
    batch, expected = built.batch, built.expected
    if column == "sequence" and built.shared is not None:
        batch, expected = built.shared.batch, built.shared.expected
    options: dict[str, Any] = {"remat": "layer"} if column == "remat" else {}
    if column in _MESHES:
        options = {"plan": Plan(_MESHES[column], Layout(), batch=built.rules), "specs": built.model.specs}
    return compared(*computed(built, batch, options), *expected())


def computed(built: Built, batch: Tree, options: Mapping[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients by dotted name of a jitted step of the model. `options`: of `ftrain.jit`."""
    model, key = built.model, built.key
    if tree.leaves(model.state):
        of_loss = ftrain.value_and_grad(model.loss, has_aux=True)
        step = ftrain.jit(lambda params, batch, state: of_loss(params, batch, key, state), **options)
        (loss, _), grads = step(built.params, batch, model.state)
    elif key is not None:
        step = ftrain.jit(lambda params, batch, key: ftrain.value_and_grad(model.loss)(params, batch, key), **options)
        loss, grads = step(built.params, batch, key)
    else:
        step = ftrain.jit(lambda params, batch: ftrain.value_and_grad(model.loss)(params, batch), **options)
        loss, grads = step(built.params, batch)
    return float(loss), dict(leaves_with_paths(grads))


def compared(loss: float, grads: Mapping[str, Tensor], wanted: float, plain: Mapping[str, Tensor | None]) -> str:
    """How far apart they are, in words. `Apart` if that is beyond `LOSS` or `GRADIENT`."""
    largest = max((float(g.norm()) for g in plain.values() if g is not None), default=0.0)
    apart = abs(loss - wanted) / max(abs(wanted), 1.0)
    far, name = 0.0, ""
    for path, grad in grads.items():
        own = plain.get(path)
        difference = float(grad.norm()) if own is None else float((grad - own).norm())
        scale = max(0.0 if own is None else float(own.norm()), _NEARLY_ZERO * largest, 1e-30)
        relative = inf if isnan(difference) else difference / scale
        if relative > far:
            far, name = relative, path
    words = f"loss {apart:.0e}, gradients {far:.0e}"
    if not (apart <= LOSS and far <= GRADIENT):
        raise Apart(f"{words} ({name})")
    return words


def _cell(run: Callable[[], Any]) -> tuple[Any, Cell]:
    """What `run()` gives, or the cell that its error makes."""
    try:
        return run(), Cell("equal")
    except Exception as error:
        words = _INSTALLED.sub("", " ".join(str(error).split()))[:600]
        if isinstance(error, NoPeer):
            return None, Cell("no_peer", words)
        if isinstance(error, Apart):
            return None, Cell("not_equal", words)
        if _is_sentence(error):
            return None, Cell("refused", words)
        return None, Cell("breaks", f"{type(error).__name__}: {words} ({_place(error)})")


def _is_sentence(error: Exception) -> bool:
    """True for a ValueError that our own code raises."""
    return isinstance(error, ValueError) and any(_file(error).is_relative_to(room) for room in _OURS)


def _file(error: Exception) -> Path:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return Path() if trace is None else Path(trace.tb_frame.f_code.co_filename).resolve()


def _place(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f"{_file(error).name}:{trace.tb_lineno}"
