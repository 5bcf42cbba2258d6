"""Numbers over the steps of a run as a picture: lines in SVG, one colour a series."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1160, 320, 76, 24, 16, 32
_COLOURS = ("var(--accent)", "var(--gradients)", "var(--update)", "var(--gathered)", "var(--workspace)")
_MOST_POINTS = 1500

Points = Sequence[tuple[float, float]]


def curve_figure(series: Mapping[str, Points], *, unit: str = "") -> str:
    """An HTML figure of each of the `series`, pairs of a step and a number; what is not finite leaves a gap.

    `unit`: of the numbers, for the axis.

    >>> "polyline" in curve_figure({"loss": [(1, 2.0), (2, 1.5)]})
    True
    """
    shown = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    shown = {name: _thinned(points) for name, points in shown.items() if points}
    if not shown:
        return "<p>No numbers.</p>"
    xs, ys = zip(*(point for points in shown.values() for point in points), strict=True)
    low, high, first, last = min(ys), max(ys), min(xs), max(xs)

    def at(x: float, y: float) -> str:
        right = (x - first) / ((last - first) or 1)
        up = (y - low) / ((high - low) or 1)
        return f"{LEFT + (WIDTH - LEFT - RIGHT) * right:.1f},{HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up:.1f}"

    lines = "".join(
        f'<polyline points="{" ".join(at(*p) for p in points)}" fill="none" stroke="{colour}" stroke-width="1.5">'
        f"<title>{escape(name)}</title></polyline>"
        + "".join(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in _dots(points, at))
        for (name, points), colour in zip(shown.items(), _COLOURS * len(shown), strict=False)
    )
    return f'<figure>{_legend(list(shown))}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">' + (
        f"{_axes(low, high, first, last, unit)}{lines}</svg></figure>"
    )


def _thinned(points: Points) -> list[tuple[float, float]]:
    """At most so many points: every n-th, and the last."""
    every = -(-len(points) // _MOST_POINTS)
    kept = list(points[::every])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _dots(points: Points, at: object) -> list[list[str]]:
    """A point each where there are few."""
    assert callable(at)
    return [at(*p).split(",") for p in points] if len(points) <= 30 else []


def _axes(low: float, high: float, first: float, last: float, unit: str) -> str:
    parts = []
    for i in range(5):
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * i / 4
        value = low + (high - low) * i / 4
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
        x = LEFT + (WIDTH - LEFT - RIGHT) * i / 4
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{first + (last - first) * i / 4:g}</text>'
        )
    parts.append(f'<text x="{LEFT}" y="12">{escape(unit)}</text>')
    return "".join(parts)


def _legend(names: Sequence[str]) -> str:
    items = "".join(
        f'<span><i style="background: {colour}"></i>{escape(name)}</span>'
        for name, colour in zip(names, _COLOURS * len(names), strict=False)
    )
    return f'<div class="legend">{items}</div>'
