"""The one language of all benches: rows of one format, printed as a table and written as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.bench.machine import Machine


@dataclass(frozen=True)
class Row:
    """One measured figure.

    `value` in `unit` (None where it could not be measured). `goal`: the most that `value` may be, None where there is
    no goal; `ok`: whether it holds, None without a goal. `peer`: the figure it is compared with, in the same unit or as
    words. `how`: what was done, in a line.
    """

    name: str
    value: float | None
    unit: str
    goal: float | None
    ok: bool | None
    peer: float | str | None
    how: str


def row(
    name: str,
    value: float | None,
    unit: str,
    *,
    goal: float | None = None,
    peer: float | str | None = None,
    valid: bool = True,
    how: str,
) -> Row:
    """A row whose `ok` is `value <= goal`; not `valid` (the sides did not compute the same) fails it."""
    ok = None if goal is None and valid else bool(valid and value is not None and (goal is None or value <= goal))
    return Row(name, value, unit, goal, ok, peer, how)


def publish(rows: Sequence[Row], title: str, file: Path | None) -> None:
    """Print the rows as a table, and write them to `file` if there is one."""
    print_table(rows, title)
    if file is not None:
        write_json(rows, file)


def write_json(rows: Sequence[Row], file: Path, *, card: str | None = None) -> None:
    """Write an object: what `Machine` says, and the `rows` as a list of objects; the folder is made.

    `card`: what other processes measured on; default: the card that this process uses, if any.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    found = {**asdict(Machine.here(card=card)), "rows": [asdict(r) for r in rows]}
    file.write_text(json.dumps(found, indent=1) + "\n")


def print_table(rows: Sequence[Row], title: str) -> None:
    """Print the rows, one line each, and below the table how each figure was made."""
    table = Table(title=title, title_justify="left")
    for heading in ("name", "value", "unit", "goal", "ok", "peer"):
        table.add_column(heading, justify="left" if heading in ("name", "unit") else "right")
    for r in rows:
        ok = {None: "", True: "yes", False: "[red]no[/red]"}[r.ok]
        table.add_row(
            r.name, _number(r.value), r.unit, "" if r.goal is None else f"≤ {_number(r.goal)}", ok, _number(r.peer)
        )
    console = Console(width=None if Console().is_terminal else 132)
    console.print(table)
    for how in dict.fromkeys(r.how for r in rows):
        console.print(f"- {how}", highlight=False)


def _number(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
