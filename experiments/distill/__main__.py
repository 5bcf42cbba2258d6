"""Train a small video model of moving digits, and distil it to four steps, to one, and frame by frame.

python -m experiments.distill [--out FOLDER] [--small]

It prints what a judge of real frames says of the teacher and of each student, and draws their films. The stages are one
fold (ftrain/run/stages.py) with one folder of checkpoints: the same command goes on where it was stopped.
"""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from experiments.distill import judge
from experiments.distill.films import Film, all_words, sources
from experiments.distill.judge import Judge, Measures
from experiments.distill.painter import Painter
from experiments.distill.samples import films, grid, samplers
from experiments.distill.workflow import Lengths, Setting, result, stages
from ftrain.checkpoint import Checkpointer
from ftrain.run.folder import write_json
from ftrain.run.stages import end_of, fold, saved_tree

_NEAR, _NEAR_BY_FRAMES = 0.03, 0.05  # how much less accurate students may be


@dataclass(frozen=True)
class Options:
    """What can be chosen."""

    out: Path = Path("runs/distill")
    """Folder of checkpoints, summary.json and films.png."""
    small: bool = False
    """A model of a few steps, to see that all runs; its films are noise."""
    films: int = 10
    """Films of each digit and way that are judged."""
    threads: int = 2
    """CPU threads of each op."""
    seed: int = 0
    """Of the weights, the films and the noise."""


def setting(options: Options) -> tuple[Setting, Judge]:
    """The sizes, and the judge."""
    film = Film()
    copies, width, batch = (1, 16, 4) if options.small else (8, 64, 64)
    trained, _ = sources(film, copies=copies, seed=options.seed)
    lengths = Lengths(2, 2, 2, 2, 2, 2) if options.small else Lengths()
    painter = Painter(film, width=width, layers=1 if options.small else 4)
    judged = judge.train(trained, steps=5 if options.small else 600, seed=options.seed)
    return Setting(painter, trained, lengths, batch=batch, seed=options.seed), judged


def main(options: Options) -> int:
    """Run it all; 0 if the students are as near to the teacher as they should, else 1."""
    torch.set_num_threads(options.threads)
    began, console = time.monotonic(), Console(width=110)
    s, judged = setting(options)
    workflow = stages(s)
    each = {stage.name: max(1, stage.steps // 5) for stage in workflow}

    def log(name: str, number: int, metrics: dict[str, Any]) -> None:
        if number % each[name] == 0:
            said = ", ".join(f"{what} {float(value):.4f}" for what, value in metrics.items())
            console.print(f"{time.monotonic() - began:6.0f} s  {name} {number}: {said}")

    words_BW, known = all_words(options.films), samplers(s.painter, s.guidance)
    made, measured = {"real": real(s, options, len(words_BW))}, dict[str, Measures]()
    with Checkpointer(options.out / "checkpoints") as checkpoints:
        fold(workflow, {}, seed=s.seed, checkpoints=checkpoints, save=200, log=log)
        for name, sampler in known.items():
            tree = saved_tree(workflow, {}, end_of(workflow, name), seed=s.seed, checkpoints=checkpoints)
            own = result(tree, "teacher" if name == "teacher" else "student")
            made[name] = films(s.painter, sampler, own, words_BW, seed=s.seed), words_BW
    for name, (films_BSHW, told_BW) in made.items():
        measured[name] = judged.measure(films_BSHW, told_BW)
    show(console, measured, s)
    grid({known[name].name: made[name][0] for name in known}, words_BW, options.out / "films.png")
    summary = {name: asdict(found) for name, found in measured.items()}
    write_json(options.out / "summary.json", {**summary, "seconds": round(time.monotonic() - began, 1)})
    console.print(f"{time.monotonic() - began:.0f} seconds in all; films in {options.out / 'films.png'}")
    best = measured["teacher"].accuracy
    near = measured["four"].accuracy >= best - _NEAR and measured["frames"].accuracy >= best - _NEAR_BY_FRAMES
    return 0 if near or options.small else 1


def real(s: Setting, options: Options, count: int) -> tuple[np.ndarray, torch.Tensor]:
    """Films of writers that are held out, and their words."""
    _, held_out = sources(s.painter.film, copies=0, seed=options.seed)
    rows_NP, words_BW = held_out.batch(count, seed=options.seed, number=1)
    return s.painter.film.to_films(rows_NP.numpy()), words_BW


def show(console: Console, measured: dict[str, Measures], s: Setting) -> None:
    """The table of all that was measured."""
    table = Table(title="films of held-out writers, and films that were made")
    for column in ("", "calls", "right frames", "Frechet distance", "motion error (pixels)"):
        table.add_column(column)
    known = samplers(s.painter, s.guidance)
    for name, found in measured.items():
        title, calls = (known[name].name, known[name].calls) if name in known else ("real films", "")
        table.add_row(title, calls, f"{found.accuracy:.1%}", f"{found.frechet:.2f}", f"{found.motion:.3f}")
    console.print(table)


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Options)))
    except ValueError as error:
        sys.exit(f"distill: {error}")
