"""The result of a search as a table for the terminal."""

from rich.console import Console
from rich.table import Table

from ftrain.plan.contributors import why
from ftrain.plan.cost import Price
from ftrain.plan.search import Result
from ftrain.plan.space import grouped

GIB = 1 << 30
COLUMNS = ("#", "layout", "tok/s/GPU", "MFU", "non-causal", "peak GiB", "exposed ms", "step ms")


def print_result(result: Result, *, title: str, rows: int = 20, console: Console | None = None) -> None:
    """Print a search's `result` under `title`: the ranked layouts, why the best is far from its bound if it is, how
    many were only estimated, and the rejected ones by reason.

    `rows`: the most layouts to print. `console`: default stdout.
    """
    console = console or Console()
    table = Table(title=title, title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "layout" else "right", no_wrap=name != "layout")
    for place, price in enumerate(result.prices[:rows], 1):
        table.add_row(str(place), *cells(price))
    console.print(table)
    if result.prices:
        best = result.prices[0]
        console.print(summary(best), highlight=False)
        words = why(best.seconds, result.bounds[best.candidate], best.exposed, best.ops)
        if words:
            console.print(f"{best.candidate}: {words}", highlight=False)
    if len(result.prices) > rows:
        console.print(f"and {len(result.prices) - rows} more that fit")
    if result.untraced:
        other, guess = result.untraced[0]
        console.print(
            f"{len(result.untraced)} legal layouts were estimated and not traced; the best of them: {other} "
            f"(at least {guess.seconds * 1e3:.0f} ms a step)",
            highlight=False,
        )
    if result.rejected:
        console.print(f"{sum(r.number for r in result.rejected)} layouts are rejected:")
    for rejected in grouped(result.rejected):
        fits = f"; what would fit: {rejected.fits}" if rejected.fits else ""
        console.print(f"  {rejected.number:6d}  {rejected.reason}  ({rejected.what}{fits})", highlight=False)


def summary(price: Price) -> str:
    """A layout's speed in all, the memory of a GPU, and what the time of a step goes to, in one sentence."""
    candidate, waits = price.candidate, price.exposed / price.seconds
    bound = "messages" if waits > 0.5 else "compute"
    took: dict[str, float] = {}
    for op, microseconds in price.ops.items():
        took[op.op] = took.get(op.op, 0.0) + microseconds
    most = sorted(took, key=lambda op: -took[op])[:3]
    return (
        f"{candidate}: {price.tokens_per_second * candidate.ranks:,.0f} tokens/s on all GPUs; "
        f"{price.peak / GIB:.1f} GiB of a GPU at the peak, {price.state / GIB:.1f} of them state and batch; bound by "
        f"{bound} ({waits:.0%} of a step waits for messages; most compute is {', '.join(most)})"
    )


def cells(price: Price) -> list[str]:
    """A price as the texts of `COLUMNS`, without the first."""
    return [
        str(price.candidate),
        f"{price.tokens_per_second:,.0f}",
        f"{price.mfu:.1%}",
        f"{price.mfu_full:.1%}",
        f"{price.peak / GIB:.1f}",
        f"{price.exposed * 1e3:.0f}",
        f"{price.seconds * 1e3:.0f}",
    ]
