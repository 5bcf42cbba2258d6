"""Models that exist through the bridge, each against the plain module: equal, refused with the reason, or wrong.

    python -m experiments.bench.coverage --set causal_lm --json coverage-causal_lm.json --page coverage.md

A row is one architecture; it runs in a process of its own, with a time limit. `covering/` has a file for each set, and
`covering/checks.py` what a row tries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from experiments.bench.covering import page
from experiments.bench.covering.checks import COLUMNS, Outcome
from experiments.bench.covering.processes import cases, outcomes, sets

_MARKS = {"not_equal": "NOT EQUAL", "breaks": "breaks", "refused": "refused", "no_peer": "", "equal": "yes", "-": "-"}


@dataclass(frozen=True)
class Coverage:
    """`set`: which sets; none: all. `only`: rows of these names; none: all. `columns`: what is tried beyond building.

    `json`: receives the rows, in the place of what it has of the same rows and columns. `page`: receives the page, of
    all files `coverage-*.json` beside `json`. `resume`: leave out rows of which `json` has all these columns, or says
    why not. `limit_s`: of one row.
    """

    set: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    columns: tuple[str, ...] = COLUMNS
    json: Path | None = None
    page: Path | None = None
    resume: bool = False
    limit_s: float = 300.0


def main(config: Coverage) -> tuple[Outcome, ...]:
    """Run the rows and print them; write the files. ValueError for a set or a row that there is not."""
    rows = chosen(config)
    if config.resume and config.json is not None and config.json.exists():
        done = _done(config.json, config.columns)
        rows = [row for row in rows if row not in done]
    found = []
    for outcome in outcomes(rows, columns=config.columns, limit_s=config.limit_s):
        found.append(outcome)
        print(line(outcome), flush=True)
        if config.json is not None:
            page.write([outcome], config.json)
    Console(width=160).print(table(found))
    if config.page is not None:
        write_page(config.page, Path() if config.json is None else config.json.parent)
    return tuple(found)


def _done(file: Path, columns: Sequence[str]) -> set[tuple[str, str]]:
    """The rows of a file of which nothing is to come: these columns were tried, or an outcome ended the row."""
    tried = {(o.set, o.name): o for o in page.read(file)}
    return {key for key, o in tried.items() if o.verdict != "equal" or set(columns) <= o.cells.keys()}


def chosen(config: Coverage) -> list[tuple[str, str]]:
    """The rows that are asked for, by set and name. ValueError for a name that no set has."""
    known = [(of, case.name) for of in config.set or sets() for case in cases(of)]
    strange = [name for name in config.only if name not in {n for _, n in known}]
    if strange:
        raise ValueError(f"no row {strange[0]!r} in the sets {', '.join(config.set or sets())}")
    return [(of, name) for of, name in known if not config.only or name in config.only]


def write_page(file: Path, folder: Path) -> None:
    """Write the page of all files `coverage-*.json` of a folder."""
    files = sorted(folder.glob("coverage-*.json"))
    found = [outcome for path in files for outcome in page.read(path)]
    file.write_text(page.page(found, [page.head(path) for path in files]))


def line(outcome: Outcome) -> str:
    """A row in one line of text, as it comes."""
    cells = " ; ".join(f"{c}: {cell.verdict} {cell.words}".rstrip() for c, cell in outcome.cells.items())
    return f"{outcome.set}/{outcome.name} | {outcome.verdict} | {outcome.about} | {cells} | {outcome.seconds} s"


def table(found: Sequence[Outcome]) -> Table:
    """The rows as a table for a terminal."""
    shown = Table("set", "name", "batch", *COLUMNS[1:], "s", "why", title="Coverage", title_justify="left")
    for o in found:
        marks = [_MARKS[o.cells[c].verdict] if c in o.cells else "" for c in COLUMNS[1:]]
        why = next((c.words for c in o.cells.values() if c.verdict not in ("equal", "-")), "")
        shown.add_row(o.set, o.name, o.about, *marks, f"{o.seconds:.0f}", why[:80])
    return shown


if __name__ == "__main__":
    main(tyro.cli(Coverage))
