"""Rows of the coverage bench in processes of their own: one that dies or hangs is a row that says so."""

import importlib
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from multiprocessing.connection import Connection

import torch

from experiments.bench.covering.case import Case
from experiments.bench.covering.checks import COLUMNS, Cell, Outcome, tried

SETS = ("causal_lm", "masked_lm", "encoder_decoder", "vision", "audio", "media", "diffusion", "images")
"""The sets of rows: a file of this folder each, with `cases() -> tuple[Case, ...]`."""
_HERE = "experiments.bench.covering"
_SLOW = (
    "torch",
    "transformers.modeling_utils",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
)
"""What all rows would import again, where it is installed."""


def sets() -> tuple[str, ...]:
    """The sets that there are."""
    return tuple(name for name in SETS if find_spec(f"{_HERE}.{name}") is not None)


def cases(name: str) -> tuple[Case, ...]:
    """The rows of a set. ValueError for a set that there is not."""
    if name not in sets():
        raise ValueError(f"no set {name!r}; there are: {', '.join(sets())}")
    found: tuple[Case, ...] = importlib.import_module(f"{_HERE}.{name}").cases()
    return found


def outcomes(rows: Sequence[tuple[str, str]], *, columns: tuple[str, ...], limit_s: float) -> Iterator[Outcome]:
    """How rows, by set and name, come out, one after the other. `limit_s`: a row that takes longer is ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_SLOW, _HERE + ".checks", *sorted({f"{_HERE}.{of}" for of, _ in rows})])
    for of, name in rows:
        hear, tell = context.Pipe(duplex=False)
        child = context.Process(target=_work, args=(of, name, columns, tell), daemon=True)
        begun = time.perf_counter()
        child.start()
        tell.close()
        cells, ended = _heard(hear, begun + limit_s)
        if child.is_alive() and ended:
            child.terminate()
        child.join()
        if ended:
            cells[_next(cells, columns)] = Cell("breaks", ended if child.exitcode == -15 else f"died, {child.exitcode}")
        about = cells.pop("about", Cell("-")).words
        yield Outcome(of, name, cells, about, round(time.perf_counter() - begun, 1))


def _heard(pipe: Connection, until: float) -> tuple[dict[str, Cell], str]:
    """The cells that came, and why no more came: empty if the row came to its end."""
    cells: dict[str, Cell] = {}
    while pipe.poll(max(0.0, until - time.perf_counter())):
        try:
            found = pipe.recv()
        except EOFError:
            return cells, "its process died"
        if found is None:
            return cells, ""
        column, cell = found
        cells[column] = cell
    return cells, "it did not end in time"


def _next(cells: dict[str, Cell], columns: tuple[str, ...]) -> str:
    """The column that was under way: the first that is asked for and has no cell."""
    return next((c for c in COLUMNS if c not in cells and (c in columns or c == "builds")), "builds")


def _work(of: str, name: str, columns: tuple[str, ...], pipe: Connection) -> None:
    torch.set_num_threads(1)
    case = next(c for c in cases(of) if c.name == name)
    for found in tried(case, columns):
        pipe.send(found)
    pipe.send(None)
