"""How a stage tells what it finds: figures as rows of the benches, other findings by name, each as soon as it is known.

A stage may be stopped at any moment, so nothing waits for its end: lines that begin with a mark are read by the parent.
"""

import json
import statistics
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from experiments.bench.table import Row, row
from ftrain.analysis.hardware import copy_bandwidth, peak_flops

_ROW, _NOTE = "@row ", "@note "
_LONGEST_ERROR = 300


@dataclass(frozen=True)
class Ceilings:
    """What the card can do at most, measured: FLOP/s of products, and bytes/s of its memory, read and written."""

    bfloat16: float
    float32: float
    memory: float

    @staticmethod
    def measured() -> "Ceilings":
        """Of the card that is here; takes a second or two."""
        card = torch.device("cuda")
        return Ceilings(
            bfloat16=peak_flops(card, torch.bfloat16),
            float32=peak_flops(card, torch.float32),
            memory=copy_bandwidth(card),
        )


@dataclass(frozen=True)
class Stage:
    """What a stage is given. `tiny`: rehearsal sizes. `out`: where files may be left. `known`: ceilings, if told."""

    tiny: bool
    out: Path
    known: Ceilings | None = None

    @property
    def ceilings(self) -> Ceilings:
        """Those that an earlier stage found, else measured now."""
        return self.known or Ceilings.measured()


@dataclass
class Found:
    """What a stage told before it ended: the last word on each name counts."""

    rows: dict[str, Row] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def note(name: str, value: Any) -> None:
    """Tell a finding that is no figure: a version, a table, the words of an error."""
    print(_NOTE + json.dumps([name, value]), flush=True)


def tell(*rows: Row) -> None:
    """Tell figures."""
    for figure in rows:
        print(_ROW + json.dumps(asdict(figure)), flush=True)


def attempt(name: str, part: Callable[[], Row | Iterable[Row] | None]) -> None:
    """Run a part of a stage and tell its rows; if it fails, that is its row, and the stage goes on."""
    try:
        found = part()
    except Exception as error:
        traceback.print_exc()
        words = f"{type(error).__name__}: {str(error)[:_LONGEST_ERROR]}"
        tell(row(name, None, "", valid=False, peer="FAILED", how=f"{name}: {words}"))
        return
    tell(*([found] if isinstance(found, Row) else found or []))


def heard(lines: Iterable[str]) -> Found:
    """What was told in the output of a stage; a line that was cut off in the middle is left out."""
    found = Found()
    for line in lines:
        mark = next((m for m in (_ROW, _NOTE) if line.startswith(m)), None)
        if mark is None or not _whole(line[len(mark) :]):
            continue
        told = json.loads(line[len(mark) :])
        if mark == _ROW:
            found.rows[told["name"]] = Row(**told)
        else:
            found.notes[told[0]] = told[1]
    return found


def _whole(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def milliseconds(function: Callable[[], Any], *, repeats: int = 10, warmup: int = 3) -> float:
    """Median time on the card. Runs are queued one behind the other, so launches count only where ops are shorter."""
    for _ in range(warmup):
        function()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in pairs:
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return max(1e-6, statistics.median(begin.elapsed_time(end) for begin, end in pairs))
