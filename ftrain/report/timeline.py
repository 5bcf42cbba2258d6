"""Memory over the run as a picture: stacked areas in SVG, with a line of text for the node under the pointer."""

import json
from collections.abc import Mapping, Sequence
from html import escape

from ftrain.analysis.memory_timeline import KINDS, Sample
from ftrain.graph.text import op_name, short_source, show_bytes

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 1160, 320, 76, 12, 24
MOST_POINTS = 2000
_MUTED = ("input0", "input1", "input2", "input3")


def timeline_figure(samples: Sequence[Sample], inputs: Mapping[str, int]) -> str:
    """An HTML figure of bytes alive: inputs as bands at the bottom, what the step allocates stacked upon them, node by
    node.

    `samples`: one per node; `inputs`: bytes by argument.
    """
    if not samples:
        return "<p>The graph has no ops.</p>"
    bands = _merge_small(inputs)
    base = sum(bands.values())
    shown = thin_out(samples)
    top = base + max(s.total for s in shown)
    # If the inputs are so large that the step's own memory would be a thin line, the axis begins within the inputs.
    floor = 0 if base <= 3 * max(top - base, 1) else base - (top - base) // 4
    scale = _Scale(len(shown), floor, max(top - floor, 1))
    areas, height = [], 0
    for i, (label, size) in enumerate(bands.items()):
        areas.append(_area(scale, [height] * len(shown), [height + size] * len(shown), _MUTED[min(i, 3)], label))
        height += size
    below = [base] * len(shown)
    for kind_index, kind in enumerate(KINDS):
        above = [b + s.bytes[kind_index] for b, s in zip(below, shown, strict=True)]
        areas.append(_area(scale, below, above, kind.split()[0], kind))
        below = above
    svg = f'<svg class="memory" data-left="{LEFT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    svg += (
        f'{_axis(scale)}{"".join(areas)}<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/></svg>'
    )
    cut = f" The axis begins at {show_bytes(floor)}; the inputs go on below." if floor else ""
    note = f"Bytes alive while each node runs.{cut} Move over the picture to see the node."
    data = json.dumps([_tooltip(s, base) for s in shown]).replace("<", "\\u003c")
    script = f'<script type="application/json">{data}</script>'
    return f'<figure>{_legend(bands)}{svg}<p class="memory-tip mono">{escape(note)}</p>{script}</figure>'


def thin_out(samples: Sequence[Sample]) -> list[Sample]:
    """At most `MOST_POINTS` samples: of each run of neighbours the highest, so that peaks stay."""
    step = -(-len(samples) // MOST_POINTS)
    return [max(samples[i : i + step], key=lambda s: s.total) for i in range(0, len(samples), step)]


class _Scale:
    """From a sample's index and bytes to the picture's coordinates."""

    def __init__(self, count: int, floor: int, span: int) -> None:
        self.count, self.floor, self.span = count, floor, span

    def x(self, index: float) -> float:
        return LEFT + (WIDTH - LEFT) * index / self.count

    def y(self, size: float) -> float:
        inner = HEIGHT - TOP - BOTTOM
        return TOP + inner * (1 - max(size - self.floor, 0) / self.span)


def _area(scale: _Scale, below: Sequence[int], above: Sequence[int], css: str, label: str) -> str:
    if list(below) == list(above):
        return ""
    upper = [f"{scale.x(i + d):.1f},{scale.y(a):.1f}" for i, a in enumerate(above) for d in (0, 1)]
    lower = [f"{scale.x(i + d):.1f},{scale.y(b):.1f}" for i, b in enumerate(below) for d in (0, 1)]
    if len(set(below)) == 1 and len(set(above)) == 1:
        upper, lower = [upper[0], upper[-1]], [lower[0], lower[-1]]
    points = " ".join(upper + lower[::-1])
    return f'<polygon class="{css}" points="{points}"><title>{escape(label)}</title></polygon>'


def _axis(scale: _Scale) -> str:
    marks = []
    for part in range(5):
        size = scale.floor + scale.span * part / 4
        y = scale.y(size)
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{show_bytes(size)}</text>')
    marks.append(f'<text x="{LEFT}" y="{HEIGHT - 6}">first node</text>')
    marks.append(f'<text x="{WIDTH}" y="{HEIGHT - 6}" text-anchor="end">last node</text>')
    return "".join(marks)


def _legend(bands: Mapping[str, int]) -> str:
    inputs = [(f"{label} {show_bytes(size)}", _MUTED[min(i, 3)]) for i, (label, size) in enumerate(bands.items())]
    entries = [(kind, kind.split()[0]) for kind in reversed(KINDS)] + inputs[::-1]
    return (
        f'<p class="legend">{"".join(f"<span><i class={css}></i>{escape(label)}</span>" for label, css in entries)}</p>'
    )


def _merge_small(inputs: Mapping[str, int]) -> dict[str, int]:
    """The three largest groups of inputs, and the others as one."""
    ordered = sorted(inputs.items(), key=lambda item: -item[1])
    bands = dict(ordered[:3])
    rest = sum(size for _, size in ordered[3:])
    return {**bands, "other inputs": rest} if rest else bands


def _tooltip(sample: Sample, base: int) -> str:
    node = sample.node
    kinds = [f"{kind} {show_bytes(b)}" for kind, b in zip(KINDS, sample.bytes, strict=True) if b]
    facts = [
        sample.loop and f"in {sample.loop}",
        node.meta.get("phase"),
        node.meta.get("path"),
        short_source(node.meta.get("source")),
    ]
    where = ", ".join(str(f) for f in facts if f)
    total = f"{show_bytes(base + sample.total)} in all, {show_bytes(sample.total)} above inputs"
    host = f"; {show_bytes(sample.host)} offloaded to the host" if sample.host else ""
    return f"{node.name} = {op_name(node)} ({where}): {total}" + (f" = {' + '.join(kinds)}" if kinds else "") + host
