"""The result of a search as one HTML page: throughput against memory, the ranked layouts, the rejected ones."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ftrain.analysis.cluster import Cluster
from ftrain.plan.contributors import why
from ftrain.plan.cost import Price
from ftrain.plan.estimate import Estimate
from ftrain.plan.search import Result
from ftrain.plan.space import Candidate, grouped
from ftrain.plan.table import COLUMNS, GIB
from ftrain.report.page import Card, Cell, Table, page

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1160, 380, 76, 24, 16, 40


def write_page(result: Result, file: str | Path, *, title: str, cluster: Cluster) -> Path:
    """Write the page of a search's `result` and return its path. Without a layout that fits it has no picture.

    `title`: the heading. `cluster`: the one that was searched, for its name and memory. OSError where the file cannot
    be written.
    """
    file = Path(file)
    cards = []
    if result.prices:
        best = result.prices[0]
        cards = [
            Card("best layout", f"{best.tokens_per_second:,.0f} tok/s/GPU", str(best.candidate)),
            Card("MFU", f"{best.mfu:.1%}", f"{best.mfu_full:.1%} with attention counted as not causal"),
            Card("peak memory", f"{best.peak / GIB:.1f} GiB", f"of {cluster.memory / GIB:.1f} on a {cluster.name}"),
            Card("exposed communication", f"{best.exposed * 1e3:.0f} ms", f"of a step of {best.seconds * 1e3:.0f} ms"),
        ]
    rejected: list[list[Cell]] = [
        [(float(r.number), str(r.number)), r.reason, r.what, r.fits] for r in grouped(result.rejected)
    ]
    untraced: list[list[Cell]] = [
        [str(c), (e.seconds, f"{e.seconds * 1e3:.0f}"), (e.memory, f"{e.memory / GIB:.1f}")]
        for c, e in result.untraced[:500]
    ]
    sections = [
        ("Throughput against memory", front_figure(result.prices, result.untraced)),
        *_why_far(result),
        ("Layouts that fit", Table(list(COLUMNS), _rows(result.prices), searchable=True).html()),
        ("Rejected", Table(["layouts", "reason", "which", "What would fit"], rejected, searchable=True).html()),
        (
            f"Estimated and not traced ({len(result.untraced)}, the best shown)",
            Table(["layout", "step ms, at least", "GiB, at least"], untraced, searchable=True).html(),
        ),
    ]
    subtitle = f"{len(result.prices)} layouts fit, {sum(r.number for r in result.rejected)} are rejected"
    file.write_text(page(title, subtitle, [], cards, sections), encoding="utf-8")
    return file


def pareto(prices: Sequence[Price]) -> list[Price]:
    """The layouts that no other beats in both throughput and memory, least memory first."""
    front: list[Price] = []
    for p in sorted(prices, key=lambda p: (p.peak, -p.tokens_per_second)):
        if not front or p.tokens_per_second > front[-1].tokens_per_second:
            front.append(p)
    return front


def front_figure(prices: Sequence[Price], untraced: Sequence[tuple[Candidate, Estimate]] = ()) -> str:
    """An HTML figure: a dot for each of `prices`, peak memory to the right, throughput up, the Pareto front as a line.

    Layouts that were only estimated (`untraced`) are rings, at the least memory and the most throughput that they can
    have.
    """
    if not prices:
        return "<p>No layout fits.</p>"
    tokens = prices[0].tokens_per_second * prices[0].seconds  # of a GPU in a step: every layout does the same work
    bounds = [(c, e.memory, tokens / e.seconds) for c, e in untraced]
    most_memory = 1.05 * max([p.peak for p in prices] + [memory for _, memory, _ in bounds])
    most_rate = 1.1 * max([p.tokens_per_second for p in prices] + [rate for _, _, rate in bounds])

    def at(memory: float, rate: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * memory / most_memory
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * rate / most_rate

    front = pareto(prices)
    best = set(map(id, front))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(p.peak, p.tokens_per_second) for p in front))
    rings = "".join(_dot(f"{c}: at most {_figures(rate, memory)}", *at(memory, rate)) for c, memory, rate in bounds)
    dots = "".join(
        _dot(
            f"{p.candidate}: {_figures(p.tokens_per_second, p.peak)}",
            *at(p.peak, p.tokens_per_second),
            fill="var(--accent)" if id(p) in best else "var(--input0)",
        )
        for p in prices
    )
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{_axes(most_memory, most_rate)}{rings}'
        f'<polyline points="{line}" fill="none" stroke="var(--accent)" stroke-width="1.5"/>{dots}{_legend()}</svg>'
        "</figure>"
    )


def _figures(rate: float, memory: float) -> str:
    return f"{rate:,.0f} tok/s/GPU, {memory / GIB:.1f} GiB"


def _dot(text: str, x: float, y: float, *, fill: str = "none") -> str:
    stroke = ' stroke="var(--soft)" stroke-opacity="0.5"' if fill == "none" else ""
    size = 5 if fill == "var(--accent)" else 4
    title = f"<title>{escape(text)}</title>"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{fill}"{stroke}>{title}</circle>'


def _legend() -> str:
    """What the dots mean, in the upper right corner."""
    kinds = (
        ("no other is better in both", "var(--accent)"),
        ("priced from its graph, and fits", "var(--input0)"),
        ("estimated alone: no less memory, no more speed", "none"),
    )
    x = WIDTH - RIGHT - 300
    return "".join(
        _dot(text, x, TOP + 8 + 18 * i, fill=fill) + f'<text x="{x + 12}" y="{TOP + 12 + 18 * i}">{text}</text>'
        for i, (text, fill) in enumerate(kinds)
    )


def _why_far(result: Result) -> list[tuple[str, str]]:
    """Where the best layout's time goes, if its step takes much more than its bound."""
    best = result.prices[0] if result.prices else None
    words = why(best.seconds, result.bounds[best.candidate], best.exposed, best.ops) if best else ""
    return [("Why the best is far from its bound", f"<pre>{escape(words)}</pre>")] if words else []


def _axes(most_memory: float, most_rate: float) -> str:
    parts = []
    for i in range(5):
        x, y = LEFT + (WIDTH - LEFT - RIGHT) * i / 4, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * i / 4
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{most_rate * i / 4:,.0f}</text>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">')
        parts.append(f"{most_memory * i / 4 / GIB:.0f}</text>")
    parts.append(f'<text x="{LEFT}" y="{TOP - 4}">tokens/s of one GPU</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">peak memory, GiB</text>')
    return "".join(parts)


def _rows(prices: Sequence[Price]) -> list[list[Cell]]:
    return [
        [
            (float(i), str(i)),
            str(p.candidate),
            (p.tokens_per_second, f"{p.tokens_per_second:,.0f}"),
            (p.mfu, f"{p.mfu:.1%}"),
            (p.mfu_full, f"{p.mfu_full:.1%}"),
            (p.peak, f"{p.peak / GIB:.1f}"),
            (p.exposed, f"{p.exposed * 1e3:.0f}"),
            (p.seconds, f"{p.seconds * 1e3:.0f}"),
        ]
        for i, p in enumerate(prices, 1)
    ]
