"""The frame of a report: a page with cards, sections and tables, in one file, for light and dark screens."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

Cell = str | tuple[float, str]  # a text, or a number to sort by and how it is shown


class Card(NamedTuple):
    """A figure at the top of a page: what it is, its value, and a note below."""

    title: str
    value: str
    note: str


@dataclass(frozen=True)
class Table:
    """A table whose columns sort on a click. `searchable` tables have a field that filters rows; `mono`: in a
    fixed-width font.
    """

    columns: list[str]
    rows: list[list[Cell]]
    searchable: bool = False
    mono: bool = False

    def html(self) -> str:
        """The table's HTML; all texts are escaped."""
        if not self.rows:
            return "<p>None.</p>"
        numeric = [isinstance(cell, tuple) for cell in self.rows[0]]
        head = "".join(
            f"<th{' class=n' if n else ''}>{escape(c)}</th>" for c, n in zip(self.columns, numeric, strict=True)
        )
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in self.rows)
        search = (
            '<input type="search" placeholder="filter rows: op, parameter, file, phase">' if self.searchable else ""
        )
        css = "scroll mono" if self.mono else "scroll"
        return f"{search}<div class='{css}'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(cell: Cell) -> str:
    if isinstance(cell, tuple):
        return f'<td class=n data-v="{cell[0]:.6g}">{escape(cell[1])}</td>'
    return f"<td class=s>{escape(cell)}</td>" if len(cell) <= 40 else f"<td>{escape(cell)}</td>"


def page(
    name: str, subtitle: str, shapes: Sequence[str], cards: Sequence[Card], sections: Sequence[tuple[str, str]]
) -> str:
    """The whole page as HTML. Every text is escaped here, except for the HTML of `sections`, pairs of (title, HTML).

    `name` and `subtitle`: the heading. `cards`: figures at the top. `shapes`: a line per input tensor.
    """
    tiles = "".join(
        f"<div class=card><h3>{escape(c.title)}</h3><b>{escape(c.value)}</b><p>{escape(c.note)}</p></div>"
        for c in cards
    )
    inputs = "".join(f"<li>{escape(s)}</li>" for s in shapes)
    parts = "".join(f"<section><h2>{escape(title)}</h2>{html}</section>" for title, html in sections)
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} · ftrain</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{escape(name)}</h1><p>{escape(subtitle)}</p>"
        f"<details><summary>All {len(shapes)} input tensors</summary><ul class=mono>{inputs}</ul></details></header>"
        f"<div class=cards>{tiles}</div>{parts}</main><script>{SCRIPT}</script></body></html>"
    )


STYLE = """
:root { color-scheme: light dark; --bg: #fbfbfa; --fg: #1d1f22; --soft: #686d76; --line: #e2e2de; --card: #fff;
  --accent: #2f6fde; --activations: #4c8bf5; --gradients: #f2994a; --update: #27a567;
  --gathered: #8f6fd8; --workspace: #c7528f;
  --input0: #b9bec7; --input1: #ccd0d7; --input2: #dbdee3; --input3: #e6e8ec; }
@media (prefers-color-scheme: dark) { :root { --bg: #15171a; --fg: #e6e7e9; --soft: #989ea8; --line: #2d3136;
  --card: #1c1f23; --accent: #7eabff; --activations: #5b8def; --gradients: #d98a45; --update: #35a06c;
  --gathered: #8268bd; --workspace: #b95287;
  --input0: #565c66; --input1: #484d56; --input2: #3b4048; --input3: #31353c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; margin: 0; } h2 { font-size: 19px; margin: 40px 0 12px; }
header p { margin: 4px 0 8px; color: var(--soft); overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--accent); } details ul { max-height: 320px; overflow: auto; padding-left: 20px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px; margin-top: 20px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; min-width: 0; }
.card h3 { margin: 0; font-size: 13px; font-weight: 500; color: var(--soft); }
.card b { font-size: 22px; font-weight: 600; } .card p { margin: 2px 0 0; font-size: 13px; color: var(--soft);
  overflow-wrap: anywhere; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
svg { width: 100%; height: auto; display: block; } svg text { font-size: 12px; fill: var(--soft); }
svg .grid { stroke: var(--line); stroke-width: 1; opacity: .7; } .cursor { stroke: var(--fg); stroke-width: 1; }
.activations { fill: var(--activations); background: var(--activations); }
.gradients { fill: var(--gradients); background: var(--gradients); }
.update { fill: var(--update); background: var(--update); }
.gathered { fill: var(--gathered); background: var(--gathered); }
.workspace { fill: var(--workspace); background: var(--workspace); }
.input0 { fill: var(--input0); background: var(--input0); } .input1 { fill: var(--input1); background: var(--input1); }
.input2 { fill: var(--input2); background: var(--input2); } .input3 { fill: var(--input3); background: var(--input3); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 8px; font-size: 13px; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px; }
.memory-tip { min-height: 3em; margin: 8px 0 0; color: var(--soft); overflow-wrap: anywhere; }
.scroll { overflow: auto; max-height: 560px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th { position: sticky; top: 0; background: var(--card); text-align: left; font-weight: 600; cursor: pointer;
  box-shadow: inset 0 -1px var(--line); white-space: nowrap; }
th[aria-sort=ascending]::after { content: " ↑"; } th[aria-sort=descending]::after { content: " ↓"; }
th, td { padding: 5px 12px; vertical-align: top; overflow-wrap: anywhere; } td { border-top: 1px solid var(--line); }
tbody tr:first-child td { border-top: 0; } tbody tr:hover { background: var(--bg); }
.s { white-space: nowrap; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.mono, .mono td { font-family: ui-monospace, SFMono-Regular, Menlo, monospace; font-size: 12px; }
.mono td:not(:first-child) { min-width: 76px; } .mono tbody tr { content-visibility: auto; }
input[type=search] { width: 100%; margin-bottom: 10px; padding: 8px 12px; font: inherit; color: inherit;
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
"""

SCRIPT = """
for (const table of document.querySelectorAll('table')) {
  const body = table.tBodies[0];
  table.querySelectorAll('th').forEach((th, i) => th.addEventListener('click', () => {
    const down = th.getAttribute('aria-sort') !== 'descending';
    for (const other of table.querySelectorAll('th')) other.removeAttribute('aria-sort');
    th.setAttribute('aria-sort', down ? 'descending' : 'ascending');
    const value = row => row.cells[i].dataset.v === undefined ? row.cells[i].textContent : +row.cells[i].dataset.v;
    const rows = [...body.rows].sort((a, b) => { const x = value(a), y = value(b);
      return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1); });
    body.append(...rows);
  }));
}
for (const field of document.querySelectorAll('input[type=search]')) {
  const rows = field.nextElementSibling.querySelectorAll('tbody tr');
  field.addEventListener('input', () => {
    const words = field.value.toLowerCase().split(/\\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
    }
  });
}
for (const picture of document.querySelectorAll('svg.memory')) {
  const figure = picture.closest('figure'), nodes = JSON.parse(figure.querySelector('script').textContent);
  const tip = figure.querySelector('.memory-tip'), cursor = picture.querySelector('.cursor');
  const left = +picture.dataset.left, width = picture.viewBox.baseVal.width;
  picture.addEventListener('pointermove', event => {
    const box = picture.getBoundingClientRect();
    const x = (event.clientX - box.left) * width / box.width;
    const i = Math.floor((x - left) / (width - left) * nodes.length);
    if (i < 0 || i >= nodes.length) return;
    cursor.setAttribute('x1', x); cursor.setAttribute('x2', x);
    tip.textContent = nodes[i];
  });
}
"""
