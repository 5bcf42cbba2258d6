"""`ftrain data stats PATH` and `ftrain data show PATH`: what is in data files, and what of it a model would learn."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ftrain import data

if TYPE_CHECKING:
    from ftrain.data.encoding import ChatEncoder, Train
    from ftrain.data.samples import Samples
    from ftrain.data.show import Run, Shown
    from ftrain.data.stats import Stats

_WIDTH = 40


@dataclass(frozen=True)
class DataStats:
    """Count rows, rejected rows, and, with a model's folder, tokens and how many of them are trained on."""

    paths: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders, globs or URLs; their rows follow each other."""
    model: Path | None = None
    """The folder of a model, for its tokenizer and chat template."""
    format: str | None = None
    """The format of the rows, by name; default: the one that the first rows have."""
    train: Literal["assistant", "last", "everything"] = "assistant"
    """What of a chat is trained on: every turn of the assistant, the last one, or everything."""
    max_tokens: int | None = None
    """Rows of more tokens are rejected."""
    rows: int | None = None
    """Look at this many rows only."""


@dataclass(frozen=True)
class DataShow:
    """Print the first rows; with a model's folder as its tokens, with colours for what is trained on."""

    paths: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders, globs or URLs; their rows follow each other."""
    n: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 4
    """How many rows."""
    model: Path | None = None
    """The folder of a model, for its tokenizer and chat template."""
    format: str | None = None
    """The format of the rows, by name; default: the one that the first rows have."""
    train: Literal["assistant", "last", "everything"] = "assistant"
    """What of a chat is trained on: every turn of the assistant, the last one, or everything."""
    html: Path | None = None
    """Write an HTML page to this file."""


@tyro.conf.configure(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)
@dataclass(frozen=True)
class Data:
    """Look at data files: `stats` counts, `show` prints rows."""

    what: Annotated[DataStats, tyro.conf.subcommand("stats")] | Annotated[DataShow, tyro.conf.subcommand("show")]


def run(options: Data) -> int:
    """`ftrain data`: 0, or 1 where every row is rejected. ValueError for data or a model that cannot be read."""
    return run_stats(options.what) if isinstance(options.what, DataStats) else run_show(options.what)


def run_stats(options: DataStats) -> int:
    """`ftrain data stats`; 1 where every row is rejected. ValueError for data or a model that cannot be read."""
    samples, console = _open(options.paths, options.format), Console()
    encoder = _encoder(options.model, options.train, options.max_tokens)
    stats = data.count(samples, encoder, rows=options.rows)
    _print_stats(stats, samples, console)
    return 0 if stats.taken else 1


def run_show(options: DataShow) -> int:
    """`ftrain data show`. ValueError for data or a model that cannot be read, and for fewer than 1 row."""
    if options.n < 1:
        raise ValueError(f"-n {options.n}: show at least 1 row")
    samples, console = _open(options.paths, options.format), Console()
    rows = list(data.show_rows(samples, options.n, _encoder(options.model, options.train)))
    console.print(_headline(samples), style="dim")
    for row in rows:
        _print_row(row, console)
    if options.html is not None:
        options.html.write_text(data.as_html(rows, title=", ".join(options.paths)), encoding="utf-8")
        console.print(f"wrote {options.html}")
    return 0


def _open(paths: tuple[str, ...], format: str | None) -> "Samples":
    if not paths:
        raise ValueError("no data: give the path of a file or a folder")
    return data.open_samples(paths, format=format)


def _encoder(model: Path | None, train: "Train", max_tokens: int | None = None) -> "ChatEncoder | None":
    if model is None:
        return None
    tokenizer = data.load_tokenizer(model)
    media = data.family_of(model, tokenizer)
    return data.ChatEncoder(tokenizer, train=train, length=data.Length(max_tokens), media=media)


def _headline(samples: "Samples") -> str:
    return f"{len(samples)} rows of the format {samples.format.name} ({samples.format.keys})"


def _print_stats(stats: "Stats", samples: "Samples", console: Console) -> None:
    console.print(_headline(samples))
    console.print(f"{stats.taken} of {stats.rows} rows can be trained on, {stats.rows - stats.taken} are rejected")
    for kind in stats.rejected:
        console.print(f"  {kind}", style="red", highlight=False, soft_wrap=True)
    if not stats.tokens:
        return
    console.print(f"{stats.tokens} tokens, {stats.share_trained:.1%} trained on; the longest row has {stats.longest}")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("tokens of a row", "rows", "tokens", ""):
        table.add_column(name, justify="right" if name else "left")
    most = max(bar.rows for bar in stats.bars)
    for bar in stats.bars:
        filled = "█" * round(_WIDTH * bar.rows / most)
        table.add_row(f"{bar.above + 1} - {bar.upto}", str(bar.rows), str(bar.tokens), filled)
    console.print(table)


def _print_row(row: "Shown", console: Console) -> None:
    console.print()
    console.print(Text(row.title, style="bold"), soft_wrap=True)
    if row.error:
        console.print(Text(f"rejected: {row.error}", style="red"), soft_wrap=True)
        return
    console.print(Text.assemble(*(_coloured(run, plain=not console.is_terminal) for run in row.runs)), soft_wrap=True)


def _coloured(run: "Run", *, plain: bool) -> tuple[str, str]:
    """A piece with its colour; where there are none, what is trained on stands between marks."""
    if run.trained is None:
        return run.text, ""
    if plain:
        return (f"⟦{run.text}⟧" if run.trained else run.text), ""
    return run.text, "black on green" if run.trained else "dim"


COMMANDS = {"stats": (DataStats, run_stats), "show": (DataShow, run_show)}
