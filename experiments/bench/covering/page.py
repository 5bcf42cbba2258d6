"""The outcomes of the coverage bench in a file each set, and the page that shows them all."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from experiments.bench.covering.checks import COLUMNS, Cell, Outcome
from experiments.bench.machine import Machine

_TITLES = {
    "causal_lm": "Causal language models of transformers",
    "masked_lm": "Masked language models of transformers",
    "encoder_decoder": "Encoder-decoders of transformers",
    "vision": "Vision encoders of transformers",
    "audio": "Audio encoders of transformers",
    "media": "Models of transformers with media in the batch",
    "diffusion": "Transformers of diffusers",
    "images": "Image models of timm and torchvision",
}
_HEADS = {"equal": "one device", "shard": "shard 2", "sequence": "sequence 2", "expert": "expert 2"}
_WORDS = {
    "not_equal": "**NOT EQUAL**",
    "breaks": "breaks",
    "refused": "refused",
    "no_peer": "",
    "equal": "equal",
    "-": "-",
}
_PEERS = ("transformers", "diffusers", "timm", "torchvision")
_INTRODUCTION = """# Which models run

Written by `python -m experiments.bench.coverage --page docs/coverage.md`; not by hand. Each row is a tiny random
configuration of one architecture, through the bridge (`ftrain.bridge`) and by itself (eager, in float32, no dropout).
"equal": the loss is the plain module's to 1e-5 and every gradient to 1e-4, both relative; on "shard 2", "sequence 2"
and "expert 2" on virtual meshes of two ranks. "saved": written, and loaded by the peer's library with strict names. A
dash: does not apply; empty: not tried. "refused": an error of ours says why, below. "breaks": an error in words of
another library or of Python. "NOT EQUAL": other numbers, silently. Rows that do not run by themselves on such a
configuration are left out.
"""


def write(found: Sequence[Outcome], file: Path) -> None:
    """Write outcomes to `file`: in the place of those that it has of the same rows and columns; the others stay."""
    kept = {(o.set, o.name): o for o in (read(file) if file.exists() else ())}
    for o in found:
        before = kept.get((o.set, o.name))
        kept[o.set, o.name] = o if before is None or o.verdict != "equal" else _both(before, o)
    rows = [asdict(kept[key]) for key in sorted(kept)]
    file.parent.mkdir(parents=True, exist_ok=True)
    head = {**asdict(Machine.here()), "versions": versions(), "totals": totals(list(kept.values()))}
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    file.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n')


def totals(found: Sequence[Outcome]) -> dict[str, int]:
    """How many rows run by themselves, and how many of them came out in each way."""
    told = [o.verdict for o in found if o.verdict != "no_peer"]
    verdicts = ("equal", "refused", "breaks", "not_equal")
    return {"rows": len(told), **{verdict: told.count(verdict) for verdict in verdicts}}


def _both(before: Outcome, now: Outcome) -> Outcome:
    """A row of which columns were tried at two times."""
    cells = before.cells if before.about == now.about else {}
    return replace(now, cells={**cells, **now.cells}, seconds=max(before.seconds, now.seconds))


def read(file: Path) -> tuple[Outcome, ...]:
    """The outcomes of a file that `write` made."""
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    return tuple(Outcome(**{**row, "cells": {c: Cell(**v) for c, v in row["cells"].items()}}) for row in rows)


def versions() -> dict[str, str]:
    """The versions of the libraries that models are taken from."""
    found = {}
    for name in _PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def page(found: Sequence[Outcome], heads: Iterable[str]) -> str:
    """The page, in Markdown. `heads`: a sentence on each file that the outcomes are of."""
    parts = [_INTRODUCTION, *(f"- {head}" for head in heads), ""]
    sets = list(dict.fromkeys(o.set for o in found))
    parts += [
        "| set | rows | equal | refused | breaks | silent | " + " | ".join(_HEADS[c] for c in list(_HEADS)[1:]) + " |"
    ]
    parts += ["|---|" + "---|" * (5 + len(_HEADS) - 1), *(_totals(s, _of(s, found)) for s in sets), ""]
    for name in sets:
        parts += [f"## {_TITLES[name]}", "", *_table(_of(name, found)), "", *_reasons(_of(name, found))]
    return "\n".join(parts).rstrip() + "\n"


def head(file: Path) -> str:
    """When and on what a file was measured, in a sentence."""
    of: dict[str, Any] = json.loads(file.read_text())
    peers = "".join(f", {name} {number}" for name, number in of["versions"].items())
    return f"`{file.name}`: {of['date']}, {of['cpu']}, torch {of['torch']}{peers}"


def _of(name: str, found: Sequence[Outcome]) -> list[Outcome]:
    return [o for o in found if o.set == name and o.verdict != "no_peer"]


def _totals(name: str, rows: Sequence[Outcome]) -> str:
    silent = sum(any(c.verdict == "not_equal" for c in o.cells.values()) for o in rows)
    counts = [sum(o.verdict == verdict for o in rows) for verdict in ("equal", "refused", "breaks")]
    meshes = []
    for column in list(_HEADS)[1:]:
        tried = [o.cells[column].verdict for o in rows if column in o.cells and o.cells[column].verdict != "-"]
        meshes.append(f"{sum(v == 'equal' for v in tried)} of {len(tried)}" if tried else "-")
    return f"| {_TITLES[name]} | {len(rows)} | " + " | ".join(map(str, [*counts, silent, *meshes])) + " |"


def _table(rows: Sequence[Outcome]) -> list[str]:
    columns = COLUMNS[1:]
    lines = ["| model | batch | " + " | ".join(_HEADS.get(c, c) for c in columns) + " | s |"]
    lines += ["|---|" + "---|" * (len(columns) + 2)]
    for o in rows:
        cells = [_WORDS[o.cells[c].verdict] if c in o.cells else "" for c in columns]
        if "equal" not in o.cells:
            cells[0] = _WORDS[o.verdict]
        lines.append(f"| {o.name} | {o.about} | " + " | ".join(cells) + f" | {o.seconds:.0f} |")
    return lines


def _reasons(rows: Sequence[Outcome]) -> list[str]:
    found = [(o.name, column, cell) for o in rows for column, cell in o.cells.items()]
    wrong = [(name, column, cell) for name, column, cell in found if cell.verdict not in ("equal", "-")]
    if not wrong:
        return []
    lines = [f"- {name}, {_HEADS.get(c, c)}, {cell.verdict.replace('_', ' ')}: {cell.words}" for name, c, cell in wrong]
    return ["What is not equal, and why:", "", *lines, ""]
