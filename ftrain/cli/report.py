"""`ftrain report RUN`: what a run trained, how its numbers went, and where it ended; on the terminal, and as a page."""

import json
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table as Rows

from ftrain.files.beneath import Folder
from ftrain.files.outside import JSON_BYTES
from ftrain.report.curve import curve_figure
from ftrain.report.page import Card, Cell, Table, page
from ftrain.run.record import Record, read_record

_BARS = "▁▂▃▄▅▆▇█"
_WIDE, _SAMPLES = 60, 50


@dataclass(frozen=True)
class ReportOptions:
    """Tell what is in the folder of a run: what was trained, losses, speed, rows that were left out, memory, saves, and
    where it ended."""

    run: tyro.conf.Positional[Path]
    """The folder of the run."""
    html: Path | None = None
    """Also write a page with curves to this file."""


def run(options: ReportOptions) -> int:
    """The command. ValueError for a folder that is no run's, or whose files cannot be read."""
    record = read_record(options.run)
    console = Console(highlight=False)
    table = Rows(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, told in record.facts():
        table.add_row(name, told)
    console.print(f"run {options.run}")
    console.print(table)
    for name, points in record.series("loss", *record.terms).items():
        console.print(f"{name:>16} {bars([value for _, value in points])} {points[-1][1]:.4f}", markup=False)
    if options.html is not None:
        options.html.write_text(html_of(record), encoding="utf-8")
        console.print(f"wrote {options.html}")
    return 0


def bars(values: list[float], *, width: int = _WIDE) -> str:
    """Numbers as a row of bars, each the mean of its part of them; a space where none is finite.

    >>> bars([0.0, 1.0, 7.0])
    '▁▂█'
    """
    parts = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    parts = parts if len(values) > width else [[value] for value in values]
    finite = [[x for x in part if abs(x) < float("inf")] for part in parts]
    means = [sum(part) / len(part) if part else None for part in finite]
    known = [mean for mean in means if mean is not None]
    low, span = min(known, default=0.0), (max(known, default=0.0) - min(known, default=0.0)) or 1.0
    return "".join(" " if m is None else _BARS[min(int((m - low) / span * 8), 7)] for m in means)


def html_of(record: Record) -> str:
    """The page of a run."""
    facts = dict(record.facts())
    cards = [
        Card(name, *_headline(facts[name])) for name in ("loss", "held-out loss", "speed", "memory") if name in facts
    ]
    held = [(float(step), loss) for step, loss in record.held_out]
    losses: dict[str, Any] = record.series("loss") | ({"held out": held} if held else {})
    sections = [
        ("Losses", curve_figure(losses, unit="nats")),
        *((name.removeprefix("loss/"), curve_figure(record.series(name))) for name in record.terms),
        ("Norm of the gradients", curve_figure(record.series("grad_norm"))),
        ("Speed", curve_figure(record.series("tokens_per_s"), unit="tokens/s")),
        ("What there is to tell", Table(["", ""], [[name, told] for name, told in facts.items()]).html()),
        ("Answers", Table(["step", "prompt", "answer"], _samples(record.path)).html()),
        ("Options", f"<pre class=scroll>{escape(json.dumps(dict(record.config), indent=2))}</pre>"),
    ]
    return page(str(record.path), facts["ended"], [], cards, sections)


def _headline(told: str) -> tuple[str, str]:
    """The first figure of a sentence, and the rest below it."""
    value, _, rest = told.partition(" ")
    return value, rest


def _samples(path: Path) -> list[list[Cell]]:
    try:
        with Folder(path) as folder:
            lines = folder.read("samples.jsonl", limit=JSON_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return []
    # by the line feed alone: other ends of lines, as U+2028 is one, may stand in an answer
    rows = [json.loads(line) for line in lines.split("\n") if line][-_SAMPLES:]
    return [[(float(row["step"]), str(row["step"])), str(row["prompt"]), str(row["answer"])] for row in rows]


COMMANDS = {"report": (ReportOptions, run)}
